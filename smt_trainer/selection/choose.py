"""Choose the blocks to train: scores and a budget give a `BlockSelection`.

`budget.py` decides how many blocks each group gives. Ranking is a stable sort, highest score first. The model's module
order breaks ties, then row order, so every rank and machine chooses the same blocks from the same scores. Under
`layer_cap`, each layer first offers its best blocks; the ranking then chooses among these. Under `rank_cap`, each
module first offers its best block rows or block columns (see `rank.py`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.budget import BudgetGroup, budget_groups, check_budget_fits
from smt_trainer.selection.rank import fits, in_best_lines

logger = logging.getLogger(__name__)


def select_blocks(
    scores: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    config: SMTConfig,
    num_parameters: int,
    base_model: str | None = None,
) -> BlockSelection:
    """Choose the highest-scoring blocks within the budget (SMT, section 3.2).

    Where `rank_cap` changes the choice, a warning says what share of the scores it costs.

    Args:
        scores: module name -> [R, C], in the model's module order.
        grids: module name -> grid.
        config: its `budget`, `budget_of`, `scope`, `layer_cap` and `rank_cap` are read (see `budget.py`).
        num_parameters: parameters of the whole model.
        base_model: name recorded in the selection.

    Raises:
        SMTError: a score is NaN or infinite, all scores that are ranked together are zero, or the budget does not fit
            the targets.
    """
    for name, score in scores.items():
        if not score.isfinite().all():
            raise SMTError(
                f"the scores of `{name}` are not finite. Gradients overflowed in the warm-up: check the data for "
                "batches without labels, or run the warm-up in bf16 or float32."
            )
    check_budget_fits(grids, config, num_parameters)
    block_indices: dict[str, np.ndarray] = {}
    total = lost = 0.0
    for group in budget_groups(grids, config, num_parameters):
        own = {name: score for name, score in scores.items() if name in group.grids}
        if not any(score.any() for score in own.values()):
            raise SMTError(
                f"all scores are zero for {group.label}, so no block is better than another. No gradient reached the "
                "targets: check that the labels are not all -100, and that the loss depends on the targeted modules."
            )
        chosen = best = _best_of(own, group)
        if config.rank_cap is not None and not all(
            fits(grids[name], blocks, config.rank_cap) for name, blocks in best.items()
        ):
            chosen = _best_of(_within_rank(own, best, group, config.rank_cap), group)
            lost += _sum(own, best) - _sum(own, chosen)
        total += _sum(own, best)
        block_indices |= {
            name: torch.stack(torch.unravel_index(blocks.sort().values, grids[name].shape), dim=1).numpy()
            for name, blocks in chosen.items()
            if len(blocks)
        }
    if lost > 1e-6 * total:
        logger.warning(
            "rank_cap=%d costs %.2g%% of the scores: the chosen blocks sum to %.4g, the best without it to %.4g.",
            config.rank_cap,
            100 * lost / total,
            total - lost,
            total,
        )
    in_order = {name: block_indices[name] for name in grids if name in block_indices}
    return BlockSelection(dict(grids), in_order, num_parameters, config, base_model)


def _sum(scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> float:
    return sum(scores[name].flatten()[blocks].double().sum().item() for name, blocks in chosen.items())


def _within_rank(
    scores: Mapping[str, Tensor], best: Mapping[str, Tensor], group: BudgetGroup, rank_cap: int
) -> dict[str, Tensor]:
    """Return scores with -inf outside the block rows or columns that each module keeps.

    Args:
        scores: module name -> [R, C].
        best: module name -> flat positions of what would be chosen without the cap.
        group: what the budget asks for.
        rank_cap: see `rank.py`.
    """
    if group.config.scope != "per_module":
        return in_best_lines(scores, group.grids, rank_cap, lambda kept: _Ranking(kept, group).is_enough())
    found = dict(scores)
    for name, blocks in best.items():
        if not fits(group.grids[name], blocks, rank_cap):
            alone, quota = {name: scores[name]}, len(blocks)
            found |= in_best_lines(alone, group.grids, rank_cap, functools.partial(_has, name=name, quota=quota))
    return found


def _has(scores: Mapping[str, Tensor], name: str, quota: int) -> bool:
    return int(scores[name].isfinite().sum()) >= quota


def _best_of(scores: Mapping[str, Tensor], group: BudgetGroup) -> dict[str, Tensor]:
    """Return module name -> flat positions of the best blocks whose scores are finite."""
    if group.config.scope == "per_module":
        quotas = group.quotas()
        return {name: _best(score.flatten().float(), quotas[name]) for name, score in scores.items() if quotas[name]}
    return _Ranking(scores, group).best()


class _Ranking:
    """The blocks of all modules of a group, ranked together, without those at -inf or beyond a layer's cap.

    Attributes:
        flat: scores [n] of all blocks in order, -inf where left out.
        counts: blocks of each module.
        numels: weights in a block of each module.
    """

    def __init__(self, scores: Mapping[str, Tensor], group: BudgetGroup) -> None:
        self.group, self.names = group, list(scores)
        self.flat = torch.cat([score.flatten().float() for score in scores.values()])
        self.counts = torch.tensor([group.grids[name].num_blocks for name in scores])
        self.numels = torch.tensor([group.grids[name].block_numel for name in scores], dtype=torch.float64)
        if group.config.layer_cap is not None:
            self.flat = self.flat.masked_fill(~self._within_layer_cap(), -torch.inf)

    def room(self) -> tuple[int, float]:
        """Return how many blocks are left, and how many weights these hold."""
        left = self.flat.isfinite()
        return int(left.sum()), float(self.numels.repeat_interleave(self.counts)[left].sum())

    def is_enough(self) -> bool:
        """Return whether the blocks that are left meet the budget."""
        blocks, weights = self.room()
        return blocks >= self.group.count if self.group.weights is None else weights >= self.group.weights

    def best(self) -> dict[str, Tensor]:
        """Return module name -> flat positions of its blocks among the best of all modules together."""
        group, (available, weights) = self.group, self.room()
        # Under caps, with blocks of several sizes, the scores decide how much is available: check again.
        group.check_room(available, weights)
        if group.weights is not None:
            best = _best(self.flat, min(available, int(group.weights / self.numels.min()) + 1))
            sizes = self.numels[torch.bucketize(best, self.counts.cumsum(0), right=True)]
            # Take the k highest-scoring blocks whose total size is nearest to the budget, at least one.
            best = best[: max(1, int((sizes.cumsum(0) - sizes / 2 <= group.weights).sum()))]
        else:
            best = _best(self.flat, group.count)
        chosen = torch.zeros(len(self.flat), dtype=torch.bool)
        chosen[best] = True
        parts = chosen.split(self.counts.tolist())
        return {name: part.nonzero().flatten() for name, part in zip(self.names, parts, strict=True)}

    def _within_layer_cap(self) -> Tensor:
        """Return a mask over `flat`, True at each layer's best blocks up to its cap."""
        allowed = torch.zeros(len(self.flat), dtype=torch.bool)
        places = {name: place for place, name in enumerate(self.names)}
        positions_of = torch.arange(len(self.flat)).split(self.counts.tolist())
        for members in self.group.layers().values():
            mine = sorted(places[name] for name in members)
            positions = torch.cat([positions_of[place] for place in mine])
            blocks, weights = self.group.cap(members)
            best = torch.sort(self.flat[positions], descending=True, stable=True).indices
            taken = self.numels[mine].repeat_interleave(self.counts[mine])[best].cumsum(0) <= weights
            allowed[positions[best[taken][:blocks]]] = True
        return allowed


def _best(flat: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` >= 1 highest scores, best first, ties in order; sort only these."""
    cutoff = len(flat) - count
    lowest = np.partition(flat.numpy(), cutoff)[cutoff].item()
    candidates = (flat >= lowest).nonzero().flatten()
    return candidates[torch.sort(flat[candidates], descending=True, stable=True).indices[:count]]
