"""How much two selections, or their scores, agree: across seeds, scores, data or warm-up lengths.

For chosen blocks A and B, the Jaccard index is |A and B| / |A or B|: 1 if both selections are the same, 0 if they share
nothing. Spearman's rank correlation is Pearson's correlation of the ranks of all scores; equal scores share the mean of
their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.model.names import by_projection
from smt_trainer.selection.block_scores import BlockScores
from smt_trainer.selection.block_selection import BlockSelection


@dataclass(frozen=True)
class Overlap:
    """What two selections share.

    Attributes:
        first: blocks that the first one chooses.
        second: blocks that the second one chooses.
        shared: blocks that both choose.
        spearman: rank correlation of all scores, in [-1, 1]; NaN where all scores of one are equal, None where there
            are no scores to compare.
        by_projection: projection (`v_proj`) -> the overlap of its modules.
    """

    first: int
    second: int
    shared: int
    spearman: float | None
    by_projection: dict[str, Overlap] = field(default_factory=dict)

    @property
    def jaccard(self) -> float:
        """Shared blocks as a fraction of the blocks in either selection; 1 if both are empty."""
        either = self.first + self.second - self.shared
        return self.shared / either if either else 1.0

    @classmethod
    def of(cls, first: BlockSelection | BlockScores, second: BlockSelection | BlockScores) -> Overlap:
        """Compare two selections. `BlockScores` stand for what they select with their own budget.

        Two `BlockScores` are also compared by ranking.

        Raises:
            SMTError: their targets or grids differ.
        """
        _check_grids(first, second)
        chosen = [_places(artefact) for artefact in (first, second)]
        scored = None
        if isinstance(first, BlockScores) and isinstance(second, BlockScores):
            scored = first.scores, second.scores
        projections = by_projection(first.grids)
        parts = {projection: cls._of(chosen, scored, names) for projection, names in projections.items()}
        return cls._of(chosen, scored, list(first.grids), parts)

    @classmethod
    def _of(cls, chosen, scored, names: list[str], parts: dict[str, Overlap] | None = None) -> Overlap:
        ours, theirs = ([places.get(name, frozenset()) for name in names] for places in chosen)
        shared = sum(len(one & other) for one, other in zip(ours, theirs, strict=True))
        rho = None if scored is None else spearman(*(_flat(scores, names) for scores in scored))
        return cls(sum(map(len, ours)), sum(map(len, theirs)), shared, rho, parts or {})


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two vectors [n]; NaN if all numbers of one are equal."""
    ranks = [_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = torch.stack([part.norm() for part in centred])
    return float((centred[0] @ centred[1]) / norms.prod()) if norms.all() else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each number [n] in float64, from 1 for the lowest; equal numbers get their mean rank."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[places]


def _flat(scores: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([scores[name].flatten() for name in names])


def _places(artefact: BlockSelection | BlockScores) -> dict[str, frozenset[tuple[int, int]]]:
    """Return module name -> set of (row, column) of its chosen blocks."""
    selection = artefact.select() if isinstance(artefact, BlockScores) else artefact
    return {name: frozenset(map(tuple, indices.tolist())) for name, indices in selection.block_indices.items()}


def _check_grids(first: BlockSelection | BlockScores, second: BlockSelection | BlockScores) -> None:
    for name in [*first.grids, *second.grids]:
        cuts = [artefact.grids.get(name) for artefact in (first, second)]
        if cuts[0] != cuts[1]:
            found = ["not a target" if cut is None else f"{cut.weight_shape} in {cut.block_shape}" for cut in cuts]
            raise SMTError(
                f"`{name}` is {found[0]} for the first and {found[1]} for the second. Compare selections or scores "
                "with the same targets and grids."
            )
