"""Where blocks lie in the tensors of a checkpoint.

The blocks of a linear lie in one tensor, its weight. Those of an expert's matrix may lie in a slice of a tensor with
all experts, or in several tensors that loading puts on top of each other (the gate and the up projection). A block that
reaches over the edge between two is cut at it: into as many blocks of fewer rows as the sizes ask for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from smt_trainer.model.grid import BlockGrid


@dataclass(frozen=True, eq=False)
class Site:
    """The blocks of one matrix that lie in one tensor.

    Attributes:
        name: of the linear or the expert's matrix.
        grid: cuts what the tensor holds of the matrix.
        block_indices: [n, 2] (row, column) of the blocks in this grid.
        blocks: [n, br, bc] their trained values.
        expert: where the matrix lies in the first dimension of the tensor; None if it is the whole tensor.
    """

    name: str
    grid: BlockGrid
    block_indices: np.ndarray
    blocks: np.ndarray
    expert: int | None = None

    def rows(self, first: int, count: int) -> Site:
        """Return the part of this site that lies in `count` rows of the matrix, from `first` on."""
        grid, (br, bc) = self.grid, self.grid.block_shape
        edge = math.gcd(br, first, count)
        n, pieces = len(self.blocks), br // edge
        row = self.block_indices[:, :1] * pieces + np.arange(pieces)
        column = np.repeat(self.block_indices[:, 1:], pieces, axis=1)
        indices = np.stack([row - first // edge, column], axis=2).reshape(n * pieces, 2)
        blocks = self.blocks.reshape(n * pieces, edge, bc)
        inside = (indices[:, 0] >= 0) & (indices[:, 0] < count // edge)
        cut = BlockGrid(count, grid.in_features, edge, bc, grid.transposed)
        return Site(self.name, cut, indices[inside], blocks[inside], self.expert)

    def matrix(self, tensor: Any) -> Any:
        """Return the matrix in a tensor, a view."""
        return tensor if self.expert is None else tensor[self.expert]

    def take(self, tensor: Any) -> Any:
        """Return the values [n, br, bc] that a tensor, of numpy or torch, has in the place of the blocks."""
        rows, columns = self.block_indices.T
        return self.grid.split(self.matrix(tensor))[rows, columns]

    def put(self, tensor: Any, blocks: Any) -> None:
        """Write values [n, br, bc] into a tensor in the place of the blocks."""
        rows, columns = self.block_indices.T
        self.grid.split(self.matrix(tensor))[rows, columns] = blocks
