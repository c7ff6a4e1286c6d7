"""The sum of what several deltas change in one base. Imports no torch.

With W a weight of the base, W_k what delta k trained there, and c_k its factor, the composed value is that of base plus
the sum of changes, or plus their mean over all K deltas (K = 1 below for the sum):

    W + 1/K sum_k c_k (W_k - W)  =  (1 - 1/K sum_k c_k) W + 1/K sum_k c_k W_k

where k runs over the deltas that train the value; all others change it by 0. The right side is computed, in
float64, and rounded once to the dtype of the blocks, as torch rounds (to 16 bits by way of float32). So where one delta
alone trains a value, with factor 1, the result is that value bit for bit, and deltas that share nothing give what
merging one after the other would. Where the factor of W is 0, the base is not needed: so the mean of new heads exists,
though the base has no such head.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smt_trainer.arrays import FLOATS, cast, dtype_name, wider
from smt_trainer.config import SMTConfig
from smt_trainer.delta.delta import Delta
from smt_trainer.errors import SMTError
from smt_trainer.merging.matrix_rows import MatrixRows, read_matrix
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.tensor_header import StoredTensor

# Fields that decide which tensors are trained whole.
OF_WHOLE = ("modules_to_save", "train_norm", "train_bias", "lowest_layer")


@dataclass(frozen=True)
class Terms:
    """The terms of the sum at the top of this file.

    Attributes:
        deltas: the deltas, on the same grids.
        factors: c_k of each delta.
        count: K.
        checkpoint: the base.
        tensors: name of a whole tensor in the deltas -> where it lies in the base; without tensors new in the model.
        parts: name of a module -> where its weight lies in the base.
    """

    deltas: list[Delta]
    factors: list[float]
    count: int
    checkpoint: Checkpoint
    tensors: Mapping[str, StoredTensor]
    parts: Mapping[str, list[MatrixRows]]

    def compose(self) -> tuple[Delta, dict[str, int], list[str]]:
        """Return the composed delta, module -> number of shared blocks, and the names of shared whole tensors."""
        first, block_indices, blocks, shared = self.deltas[0], {}, {}, {}
        for name in first.selection.grids:
            if any(name in delta.block_arrays for delta in self.deltas):
                block_indices[name], blocks[name], touching = self._blocks(name)
                shared |= {name: touching} if touching else {}
        holders = Counter(name for delta in self.deltas for name in delta.whole_arrays)
        whole = {name: self._whole(name) for name in holders}
        config, unnamed = _described(self.deltas)
        selection = replace(first.selection, block_indices=block_indices, config=config)
        if len(self.deltas) > 1:
            selection = replace(selection, config=replace(config, budget=selection.num_blocks))
        # As in training, the fingerprint leaves out parameters that the delta holds whole.
        ours = first.fingerprint
        common = {name: checksum for name, checksum in ours.checksums.items() if self._is_in_all_bases(name)}
        rows = {name: count for name, count in ours.rows.items() if name in common}
        fingerprint = replace(ours, checksums=common, rows=rows)
        composed = Delta(selection, blocks, whole, fingerprint, first.weight_dtype, first.architecture, unnamed)
        return composed, shared, [name for name, count in holders.items() if count > 1]

    def _blocks(self, name: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Return indices [n, 2] and values [n, br, bc] of a module's blocks, and how many of them are shared."""
        grid, held = self.deltas[0].selection.grids[name], []
        for delta, factor in zip(self.deltas, self.factors, strict=True):
            if name in delta.block_arrays:
                places = np.ravel_multi_index(tuple(delta.selection.block_indices[name].T), grid.shape)
                held.append((places, delta.block_arrays[name], factor))
        union, holders = np.unique(np.concatenate([places for places, _, _ in held]), return_counts=True)
        block_indices = np.stack(np.unravel_index(union, grid.shape), axis=1)
        weight = read_matrix(self.checkpoint, self.parts[name])
        before = cast(grid.split(weight)[tuple(block_indices.T)], self.deltas[0].weight_dtype)
        terms = [(np.searchsorted(union, places), values, factor) for places, values, factor in held]
        return block_indices, self._sum(terms, before), int((holders > 1).sum())

    def _whole(self, name: str) -> np.ndarray:
        """Return the values of a tensor that deltas hold whole."""
        held = [
            (delta.whole_arrays[name], factor)
            for delta, factor in zip(self.deltas, self.factors, strict=True)
            if name in delta.whole_arrays
        ]
        first = held[0][0]
        if len(held) == 1 and held[0][1] == self.count == 1:
            return first
        needs_base = not _is_one(math.fsum(factor for _, factor in held) / self.count)
        before = self._base(name) if name in self.tensors and needs_base else None
        found = [values for values in (*(values for values, _ in held), before) if values is not None]
        shapes, dtypes = {values.shape for values in found}, {dtype_name(values) for values in found}
        if len(shapes) > 1 or not dtypes <= {*FLOATS} or (needs_base and before is None):
            raise SMTError(
                f"`{name}` has no change that could be weighted: it is new in the model, has several shapes (found "
                f"{', '.join(map(str, sorted(shapes)))}), or holds no floats ({', '.join(sorted(dtypes))}). Only one "
                "delta may hold it, with weight 1; or all hold it, and you take the mean."
            )
        before = None if before is None else cast(before, dtype_name(first))[None]
        return self._sum([(slice(None), values[None], factor) for values, factor in held], before)[0]

    def _sum(self, terms: list[tuple[Any, np.ndarray, float]], before: np.ndarray | None) -> np.ndarray:
        """Return the sum at the top of this file, in the widest dtype of the trained values.

        Args:
            terms: which of the n pieces a delta trains, their values [m, ...], and the factor c_k.
            before: the base's values [n, ...]; None if their factor is 0.
        """
        like = terms[0][1] if before is None else before
        # Adding to -0 leaves every number as it is, even -0.
        total, used = np.full(like.shape, -0.0), np.zeros((len(like), *[1] * (like.ndim - 1)))
        for pieces, values, factor in terms:
            if factor:
                total[pieces] += factor * cast(values, "float64")
                used[pieces] += factor
        total, used = total / self.count, used / self.count
        if before is not None and not _is_one(used).all():
            total = np.where(_is_one(used), total, total + (1 - used) * cast(before, "float64"))
        return cast(total, functools.reduce(wider, [dtype_name(values) for _, values, _ in terms]))

    def _is_in_all_bases(self, name: str) -> bool:
        return all(name in delta.fingerprint.checksums for delta in self.deltas)

    def _base(self, name: str) -> np.ndarray:
        return self.checkpoint.array(self.tensors[name])


def _is_one(share: Any) -> Any:
    """Return whether a sum of weights, such as 0.7 + 0.2 + 0.1, is 1 up to rounding."""
    return np.isclose(share, 1, rtol=1e-12, atol=0)


def _described(deltas: list[Delta]) -> tuple[SMTConfig, list[str]]:
    """Return the configuration of a composed delta, and the whole tensors that it does not name.

    The configuration is the first delta's; with several deltas, without `scope` and caps. Unless all train the same
    tensors whole, it names none of these.
    """
    config, first = deltas[0].selection.config, deltas[0]

    def whole(delta: Delta) -> tuple:
        return sorted(delta.whole_arrays), *(getattr(delta.selection.config, name) for name in OF_WHOLE)

    if len(deltas) > 1:
        config = replace(config, scope="global", layer_cap=None, rank_cap=None)
    if all(whole(delta) == whole(first) for delta in deltas):
        return config, sorted({name for delta in deltas for name in delta.unnamed})
    config = replace(config, modules_to_save=None, train_norm=False, train_bias=False)
    return config, sorted({name for delta in deltas for name in delta.whole_arrays})
