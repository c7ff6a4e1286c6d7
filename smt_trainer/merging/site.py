"""Where blocks lie in the tensors of a checkpoint.

The blocks of a linear lie in one tensor, its weight. Those of an expert's matrix may lie in a slice of a tensor with
all experts, or in several tensors that loading concatenates (the gate and the up projection). A block that crosses the
boundary between two of them is cut there: all blocks are cut into ones of fewer rows that fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smt_trainer.model.grid import BlockGrid


def cut_blocks(
    grid: BlockGrid, fine: BlockGrid, indices: np.ndarray, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices [m, 2], row by row, and values [m, br', bc'] of the finer blocks that make up coarser ones.

    Args:
        grid: of the blocks.
        fine: the same with blocks of br' x bc', which divide those of `grid`.
        indices: of the blocks [n, 2].
        blocks: their values [n, br, bc].
    """
    if fine == grid:
        return indices, blocks
    down, across = grid.block_rows // fine.block_rows, grid.block_columns // fine.block_columns
    inside = np.stack(np.meshgrid(np.arange(down), np.arange(across), indexing="ij"), axis=-1)
    finer = (indices[:, None, None] * (down, across) + inside).reshape(-1, 2)
    values = blocks.reshape(-1, down, fine.block_rows, across, fine.block_columns).swapaxes(2, 3)
    order = np.lexsort(finer.T[::-1])
    return finer[order], values.reshape(-1, *fine.block_shape)[order]


@dataclass(frozen=True, eq=False)
class Site:
    """The blocks of one matrix that lie in one tensor.

    Attributes:
        name: of the linear or the expert's matrix.
        grid: divides the rows of the matrix that the tensor holds into blocks.
        block_indices: [n, 2] (row, column) of the blocks in this grid.
        blocks: [n, br, bc] their trained values.
        expert: index of the matrix in the first dimension of a tensor of all experts; None for other tensors.
    """

    name: str
    grid: BlockGrid
    block_indices: np.ndarray
    blocks: np.ndarray
    expert: int | None = None

    def rows(self, first: int, count: int) -> Site:
        """Return the part of this site that lies in `count` rows, from row `first` of the matrix on, which is negative
        if other matrices lie before it."""
        fine = replace(self.grid, block_rows=math.gcd(self.grid.block_rows, first, count))
        indices, blocks = cut_blocks(self.grid, fine, self.block_indices, self.blocks)
        indices = indices - (first // fine.block_rows, 0)
        inside = (indices[:, 0] >= 0) & (indices[:, 0] < count // fine.block_rows)
        return Site(self.name, replace(fine, out_features=count), indices[inside], blocks[inside], self.expert)

    def matrix(self, tensor: Any) -> Any:
        """Return a view of the matrix in a tensor."""
        return tensor if self.expert is None else tensor[self.expert]

    def take(self, tensor: Any) -> Any:
        """Return the values [n, br, bc] at the places of the blocks in a numpy or torch tensor."""
        rows, columns = self.block_indices.T
        return self.grid.split(self.matrix(tensor))[rows, columns]

    def put(self, tensor: Any, blocks: Any) -> None:
        """Write values [n, br, bc] into a tensor at the places of the blocks."""
        rows, columns = self.block_indices.T
        self.grid.split(self.matrix(tensor))[rows, columns] = blocks
