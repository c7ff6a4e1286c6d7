"""A convolution whose backward forms only the chosen parts of the weight gradient.

Forward and input gradient are those of the dense convolution (`model/convolution.py`). Only a part of the weight
gradient is formed: the rows (output channels) and, in each group, the input channels that some block touches. This is
the weight gradient of a smaller convolution, from slices of the output gradient dy [N, O, *space] and the input
x [N, I, *space]:

    dW[rows, channels] = convolution_backward(dy[:, rows], x[:, channels])

Groups with equally many chosen rows share a product: one convolution with that many groups. So the chosen channels of a
depthwise convolution take one product, and a group in which nothing is chosen takes none. If blocks are whole rows, the
formed gradient is theirs. Other blocks are cut out of it: it may be larger than the blocks, but covers no more than the
rows and channels that they touch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_trainer.model.convolution import Geometry
from smt_trainer.model.grid import BlockGrid


@dataclass(frozen=True)
class Product:
    """One product: `groups` groups with `rows` chosen output channels each; `takes_all` if it needs no slices."""

    groups: int
    rows: int
    takes_all: bool


@dataclass(frozen=True)
class ConvPlan:
    """How the gradients of one weight's blocks are formed; hashable, so that torch.compile can guard it.

    Attributes:
        products: in the order of `positions`.
        channels: number of input channels in each group that blocks touch.
        blocks: number of blocks to cut out; 0 if the formed rows are the blocks.
    """

    grid: BlockGrid
    products: tuple[Product, ...]
    channels: int
    blocks: int


def group_channels(block_indices: Tensor, grid: BlockGrid) -> tuple[ConvPlan, Tensor, Tensor]:
    """Group the blocks of a convolution's weight into products.

    Args:
        block_indices: [n, 2] (row, column) of the chosen blocks, in any order.
        grid: the weight's grid.

    Returns:
        The plan; `block_indices` [n, 2] in stored order; and the positions: for each product its output channels and
        its input channels; then, unless blocks are whole rows, the rows [n * br] and the columns [n * bc] of all blocks
        in the formed gradient.
    """
    size, (br, bc) = math.prod(grid.kernel), grid.block_shape
    rows_in_group, read = grid.column_shape[0], grid.in_features // size
    block_rows, block_columns = block_indices.long().unbind(1)
    rows = (block_rows[:, None] * br + torch.arange(br)).unique()
    channels = ((block_columns[:, None] * bc + torch.arange(bc)) // size).unique()
    groups, counts = (rows // rows_in_group).unique(return_counts=True)
    products, positions, order = [], [], []
    for count in counts.unique().tolist():
        mine = groups[counts == count]
        taken = rows[torch.isin(rows // rows_in_group, mine)]
        into = (mine[:, None] * read + channels).flatten()
        takes_all = len(taken) == grid.out_features and len(channels) == read
        products.append(Product(len(mine), count, takes_all))
        positions += [taken, into]
        order.append(taken)
    places = torch.zeros(grid.out_features, dtype=torch.long)
    places[torch.cat(order)] = torch.arange(len(rows))
    stored = block_indices[torch.argsort(places[block_rows * br] * grid.shape[1] + block_columns)]
    are_rows = (br, bc) == (1, grid.in_features)
    if not are_rows:
        columns = torch.zeros(grid.in_features, dtype=torch.long)
        columns[(channels[:, None] * size + torch.arange(size)).flatten()] = torch.arange(len(channels) * size)
        block_rows, block_columns = stored.long().unbind(1)
        positions += [
            places[(block_rows[:, None] * br + torch.arange(br)).flatten()],
            columns[(block_columns[:, None] * bc + torch.arange(bc)).flatten()],
        ]
    plan = ConvPlan(grid, tuple(products), len(channels), 0 if are_rows else len(stored))
    return plan, stored, torch.cat(positions)


def block_gradients(dy: Tensor, x: Tensor, plan: ConvPlan, positions: Tensor, geometry: Geometry) -> Tensor:
    """Compute the chosen blocks [n, br, bc] of the weight gradient, in stored order and dy's dtype, for dy
    [N, O, *space] and x [N, I, *space]."""
    (br, bc), kernel, formed, start = plan.grid.block_shape, plan.grid.kernel, [], 0
    for product in plan.products:
        sizes = product.groups * product.rows, product.groups * plan.channels
        out, into = positions[start : start + sum(sizes)].split(sizes)
        start += sum(sizes)
        parts = (dy, x) if product.takes_all else (dy.index_select(1, out), x.index_select(1, into))
        geometry_of_part = geometry._replace(groups=product.groups)
        formed.append(geometry_of_part.weight_gradient(*parts, plan.channels, kernel).flatten(1))
    gradient = torch.cat(formed) if len(formed) > 1 else formed[0]
    if not plan.blocks:
        return gradient.unsqueeze(1)
    rows, columns = positions[start:].split([plan.blocks * br, plan.blocks * bc])
    return gradient[rows.view(-1, br, 1), columns.view(-1, 1, bc)]


class SparseConv(torch.autograd.Function):
    """`sparse_conv` with its backward; see the top of this file."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        positions: Tensor,
        plan: ConvPlan,
        geometry: Geometry,
    ) -> Tensor:
        # Keep x uncast, by reference, as the frozen convolution does.
        ctx.save_for_backward(x, weight, positions)
        ctx.plan, ctx.geometry, ctx.master_dtype = plan, geometry, blocks.dtype
        return geometry.product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        x, weight, positions = ctx.saved_tensors
        needs_dx, _, needs_dbias, needs_dblocks, *_ = ctx.needs_input_grad
        dx = dbias = dblocks = None
        if needs_dx:
            dx = ctx.geometry.input_gradient(dy, x.to(dy.dtype), weight.to(dy.dtype)).to(x.dtype)
        if needs_dbias:
            dbias = dy.sum((0, *range(2, dy.ndim)))
        if needs_dblocks:
            dblocks = block_gradients(dy, x, ctx.plan, positions, ctx.geometry).to(ctx.master_dtype)
        return dx, None, dbias, dblocks, None, None, None


def sparse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    positions: Tensor,
    plan: ConvPlan,
    geometry: Geometry,
) -> Tensor:
    """Convolve, with gradients for x, bias and the chosen blocks of the weight.

    Args:
        x: [N, I, *space], padded as `geometry` expects.
        weight: [O, I/g, *kernel] the dense weight; receives no gradient.
        bias: [O] or None.
        blocks: [n, br, bc] the trainable blocks in stored order; receives their gradient in its own dtype.
        positions: int64, from `group_channels`.
        plan: from `group_channels`.
        geometry: of the convolution.

    Returns:
        y: [N, O, *space], in the dtype that the dense convolution gives (autocast included).
    """
    return SparseConv.apply(x, weight, bias, blocks, positions, plan, geometry)
