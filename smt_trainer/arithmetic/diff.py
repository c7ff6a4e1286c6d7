"""Compare two deltas: whether they have the same base, which blocks they share, and how far these differ.

A delta holds trained values. For deltas of one base, W_A - W_B is also the difference of their changes, so the norms

    difference   |W_A - W_B|, the root of the sum of squares over the blocks that both train
    values       |W_A| over the same blocks

need no base. Blocks of different shapes are cut into common ones (`refine.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smt_trainer.arithmetic.change_norms import change_norm
from smt_trainer.arithmetic.refine import on_one_grid
from smt_trainer.arrays import cast
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.hub import find_delta
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.names import by_projection
from smt_trainer.selection.overlap import Overlap


@dataclass(frozen=True)
class BlockDiff:
    """Blocks of a module, or of several.

    Attributes:
        first: number of blocks that the first delta trains.
        second: number of blocks that the second delta trains.
        shared: number of blocks that both train.
        difference: norm of the difference of the shared blocks; see the top of this file.
        values: norm of the first delta's values in them.
    """

    first: int
    second: int
    shared: int
    difference: float
    values: float

    @property
    def jaccard(self) -> float:
        """Shared blocks as a fraction of the blocks in either delta."""
        return Overlap(self.first, self.second, self.shared, None).jaccard


@dataclass(frozen=True)
class DeltaDiff:
    """What two deltas have in common.

    Attributes:
        same_base: whether their fingerprints agree; None if other dtypes or samples keep them from being compared.
        names: names of the bases, as the deltas record them; None if not recorded.
        other_values: names of the tensors of the base that differ, as far as fingerprints tell.
        modules: module name -> its blocks, for modules that either trains.
        projections: projection (`v_proj`) -> the blocks of its modules.
        total: all blocks.
        whole: tensor that either holds whole -> norm of the difference; None if only one holds it or shapes differ.
    """

    same_base: bool | None
    names: tuple[str | None, str | None]
    other_values: list[str]
    modules: dict[str, BlockDiff]
    projections: dict[str, BlockDiff]
    total: BlockDiff
    whole: dict[str, float | None]


def diff_deltas(first: str | Path, second: str | Path) -> DeltaDiff:
    """Compare two delta folders.

    Raises:
        SMTError: a delta is missing or damaged, or the shapes of their weights differ.
    """
    one, other = on_one_grid([Delta.load(find_delta(delta)) for delta in (first, second)])
    modules = {name: _blocks(name, one, other) for name in one.selection.grids}
    modules = {name: part for name, part in modules.items() if part.first or part.second}
    projections = {
        projection: _together([modules[name] for name in names]) for projection, names in by_projection(modules).items()
    }
    names = dict.fromkeys([*one.whole_arrays, *other.whole_arrays])
    differing = _differing_bases(one.fingerprint, other.fingerprint)
    return DeltaDiff(
        None if differing is None else not differing,
        (one.selection.base_model, other.selection.base_model),
        differing or [],
        modules,
        projections,
        _together(list(modules.values())),
        {name: _difference(one.whole_arrays.get(name), other.whole_arrays.get(name)) for name in names},
    )


def _blocks(name: str, one: Delta, other: Delta) -> BlockDiff:
    grid = one.selection.grids[name]
    places = [
        np.ravel_multi_index(tuple(delta.selection.block_indices.get(name, np.empty((0, 2), np.int64)).T), grid.shape)
        for delta in (one, other)
    ]
    counts = len(places[0]), len(places[1])
    shared, ours, theirs = np.intersect1d(*places, assume_unique=True, return_indices=True)
    if not len(shared):
        return BlockDiff(*counts, 0, 0.0, 0.0)
    values, others = one.block_arrays[name][ours], other.block_arrays[name][theirs]
    norm = float(np.linalg.norm(cast(values, "float64")))
    return BlockDiff(*counts, len(shared), change_norm(values, others), norm)


def _together(parts: list[BlockDiff]) -> BlockDiff:
    counts = [sum(getattr(part, name) for part in parts) for name in ("first", "second", "shared")]
    norms = [math.hypot(*(getattr(part, name) for part in parts)) for name in ("difference", "values")]
    return BlockDiff(*counts, *norms)


def _difference(ours: np.ndarray | None, theirs: np.ndarray | None) -> float | None:
    return None if ours is None or theirs is None or ours.shape != theirs.shape else change_norm(ours, theirs)


def _differing_bases(ours: Fingerprint, theirs: Fingerprint) -> list[str] | None:
    """Return the names of the tensors that differ between two bases; None if that cannot be told."""
    if (ours.dtype, ours.stride) != (theirs.dtype, theirs.stride):
        return None
    first, second = ours.checksums | ours.codes, theirs.checksums | theirs.codes
    return [name for name in first if first[name] != second.get(name, first[name])]
