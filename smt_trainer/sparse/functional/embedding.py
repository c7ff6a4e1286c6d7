"""An embedding whose backward forms only the gradients of the rows with chosen blocks.

Forward is that of the dense embedding. The gradient of m rows is that of a smaller embedding, with m tokens and one for
all others, which gets no gradient: each token is mapped to its place among the m, or to m. With the gradient
dy [..., H] of the output,

    dW[rows] = embedding_backward(dy, place[ids])           [m, H]

The padding token is mapped to m, too: it gets no gradient, even if it is chosen. If blocks are whole rows, these
gradients are theirs; other blocks are cut out of the rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_trainer.model.grid import BlockGrid


def place_tokens(block_indices: Tensor, grid: BlockGrid, padding: int | None) -> tuple[Tensor, Tensor, BlockGrid]:
    """Map the tokens of an embedding to their places among the rows with blocks.

    Args:
        block_indices: [n, 2] (row, column) of the chosen blocks, in stored order.
        grid: the weight's grid.
        padding: the padding token, which gets no gradient, if there is one.

    Returns:
        The place [V] of each token among the m rows with blocks, or m; (row, column) [n, 2] of the blocks in the grid
        of the m rows; and that grid.
    """
    rows, row_of_block = block_indices[:, 0].long().unique(return_inverse=True)
    tokens = (rows[:, None] * grid.block_rows + torch.arange(grid.block_rows)).flatten()
    places = torch.full((grid.out_features,), len(tokens))
    places[tokens] = torch.arange(len(tokens))
    if padding is not None:
        places[padding] = len(tokens)
    within = torch.stack([row_of_block, block_indices[:, 1].long()], dim=1)
    return places, within, replace(grid, out_features=len(tokens))


class SparseEmbedding(torch.autograd.Function):
    """`sparse_embedding` with its backward; see the top of this file."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, blocks: Tensor, places: Tensor, within: Tensor, grid: BlockGrid):
        ctx.save_for_backward(ids, places, within)
        ctx.grid, ctx.master_dtype = grid, blocks.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        ids, places, within = ctx.saved_tensors
        count = ctx.grid.out_features
        rows = torch.ops.aten.embedding_dense_backward(dy, places[ids], count + 1, count, False)[:count]
        return None, None, ctx.grid.gather(rows, within).to(ctx.master_dtype), None, None, None


def sparse_embedding(
    ids: Tensor, weight: Tensor, blocks: Tensor, places: Tensor, within: Tensor, grid: BlockGrid
) -> Tensor:
    """Look up y = W[ids], with a gradient for the chosen blocks of W.

    Args:
        ids: [...] integers below V.
        weight: [V, H] the dense weight; receives no gradient.
        blocks: [n, br, bc] the trainable blocks; receives their gradient in its own dtype.
        places, within, grid: from `place_tokens`.

    Returns:
        y: [..., H].
    """
    return SparseEmbedding.apply(ids, weight, blocks, places, within, grid)
