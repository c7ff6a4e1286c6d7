"""Find where two tensors differ and by how much, reading a piece at a time. Imports no torch.

With W a weight of the base and W' that of the tuned model, the change of a block b is D_b = W'_b - W_b, and its norm
|D_b| is the root of the sum of squares, in float64. Both are views of mapped files, so memory holds about `PIECE`
values of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from smt_trainer.arrays import bits, cast
from smt_trainer.model.grid import BlockGrid

PIECE = 2**20


def differing_blocks(grid: BlockGrid, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return which blocks [R, C] of two weights of `grid.stored_shape` differ in any bit."""
    strips = _strips(grid, before, after)
    return np.concatenate([(bits(old) != bits(new)).any((2, 3)) for old, new in strips])


def block_norms(grid: BlockGrid, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the norms [R, C], float64, of the changes of the blocks of a weight of `grid.stored_shape`."""
    strips = _strips(grid, before, after)
    return np.concatenate([np.sqrt(_squares(old, new).sum((2, 3))) for old, new in strips])


def change_norm(before: np.ndarray, after: np.ndarray) -> float:
    """Return the norm of the change of a tensor of any shape."""
    old, new = before.reshape(-1), after.reshape(-1)
    starts = range(0, old.size, PIECE)
    return math.sqrt(sum(_squares(old[at : at + PIECE], new[at : at + PIECE]).sum() for at in starts))


def _squares(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return (cast(new, "float64") - cast(old, "float64")) ** 2


def _strips(grid: BlockGrid, before: np.ndarray, after: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield views [r, C, br, bc] of a few block rows of two weights at a time."""
    old, new = grid.split(before), grid.split(after)
    step = max(1, PIECE // (grid.block_rows * grid.in_features))
    for start in range(0, grid.shape[0], step):
        yield old[start : start + step], new[start : start + step]
