"""A linear whose backward forms only the chosen blocks of the weight gradient.

Forward and input gradient are those of a dense linear (x is [T, I], y and dy are [T, O], T tokens over all leading
dimensions):

    y  = x W^T + bias
    dx = dy W

Of the weight gradient dW = dy^T x, only the n chosen blocks are computed (SMT, section 3.1 and figure 2b):

    dW[r, c] = dy[:, r-th block row]^T  x[:, c-th block column]          [br, bc]

Blocks in one block column share their slice of x, so one matrix product computes them (`Group`). It takes the slices of
dy side by side, which costs nothing if the block rows are adjacent. Neighbouring block columns with blocks on the same
block rows also share a product; if all blocks are chosen, one product suffices. If the blocks touch fewer block rows
than block columns (columns as blocks, for example), the roles are swapped. Batch and sequence are first flattened into
T: one product with a long inner dimension instead of one per sequence.

If the grid is `transposed` (GPT-2's `Conv1D`), the parameter holds W^T [I, O]. Only the two dense products differ; the
blocks are those of W.

The values of the blocks live in W, where forward reads them; `blocks` enters the op only to receive the gradient. A
quantised W cannot hold them: there `read_weight` builds the dense W with the blocks in it, anew for each product.
`kept_input.py` decides how x is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.functional.kept_input import KeptInput, find_origin

# From this many features per block, copying run by run is faster than copying feature by feature.
RUN_EDGE = 8


@dataclass(frozen=True)
class Group:
    """Blocks `first` to `last` (exclusive) in stored order, which lie on neighbouring block columns (or rows).

    Attributes:
        line: the first of these block columns (or rows).
        lines: the number of these block columns (or rows).
        runs: start and length of each run of neighbouring block rows (or columns) with blocks; the same for every
            line.
    """

    first: int
    last: int
    line: int
    lines: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """How the blocks of one weight are grouped into matrix products; hashable, so that torch.compile can guard it."""

    grid: BlockGrid
    by_column: bool
    groups: tuple[Group, ...]


def group_blocks(block_indices: Tensor, grid: BlockGrid) -> tuple[Plan, Tensor, Tensor]:
    """Group the blocks of one weight into matrix products.

    Args:
        block_indices: [n, 2] (row, column) of the chosen blocks, in any order.
        grid: the weight's grid.

    Returns:
        The plan; `block_indices` [n, 2] in stored order (line by line); and the positions [n * edge] of the features
        that each line gathers, where edge is br (by column) or bc (by row).
    """
    rows, columns = block_indices.long().unbind(1)
    by_column = len(columns.unique()) <= len(rows.unique())
    lines, offsets = (columns, rows) if by_column else (rows, columns)
    length, edge = (grid.shape[0], grid.block_rows) if by_column else (grid.shape[1], grid.block_columns)
    order = torch.argsort(lines * length + offsets)
    lines, offsets = lines[order], offsets[order]

    groups, first = [], 0
    for line, count in zip(*(part.tolist() for part in lines.unique_consecutive(return_counts=True)), strict=True):
        group = Group(first, first + count, line, 1, _runs(offsets[first : first + count].tolist()))
        if groups and groups[-1].runs == group.runs and groups[-1].line + groups[-1].lines == line:
            before = groups.pop()
            group = replace(before, last=group.last, lines=before.lines + 1)
        groups.append(group)
        first += count
    positions = (offsets[:, None] * edge + torch.arange(edge)).flatten()
    return Plan(grid, by_column, tuple(groups)), block_indices[order], positions


def _runs(offsets: list[int]) -> tuple[tuple[int, int], ...]:
    """Return start and length of each run of neighbours among ascending numbers."""
    starts = [i for i, offset in enumerate(offsets) if i == 0 or offsets[i - 1] != offset - 1]
    return tuple((offsets[i], end - i) for i, end in zip(starts, [*starts[1:], len(offsets)], strict=True))


def block_gradients(dy: Tensor, x: KeptInput, plan: Plan, positions: Tensor) -> Tensor:
    """Compute the chosen blocks [n, br, bc] of dy^T x, in stored order and dy's dtype, for dy [T, O] and x [T, I]."""
    br, bc = plan.grid.block_shape
    blocks = dy.new_empty(plan.groups[-1].last if plan.groups else 0, br, bc)
    gathered = dy if plan.by_column else x.columns(0, plan.grid.in_features).to(dy.dtype)
    for group in plan.groups:
        if plan.by_column:
            dy_part = _take(gathered, group, br, positions)
            x_part = x.columns(group.line * bc, group.lines * bc).to(dy.dtype)
        else:
            dy_part = dy.narrow(1, group.line * br, group.lines * br)
            x_part = _take(gathered, group, bc, positions)
        product = torch.mm(dy_part.t(), x_part)
        parts = product.view(-1, br, product.shape[1] // bc, bc).transpose(1, 2)
        blocks[group.first : group.last] = (parts.transpose(0, 1) if plan.by_column else parts).flatten(0, 1)
    return blocks


def _take(features: Tensor, group: Group, edge: int, positions: Tensor) -> Tensor:
    """Return the features [T, k * edge] of a line of k blocks: a slice if they are adjacent, else a copy."""
    slices = [features.narrow(1, start * edge, length * edge) for start, length in group.runs]
    if len(slices) == 1:
        return slices[0]
    if edge >= RUN_EDGE:
        return torch.cat(slices, dim=1)
    count = sum(length for _, length in group.runs)
    return features.index_select(1, positions[group.first * edge : (group.first + count) * edge])


def _transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y = x weight + bias for a weight [I, O], by the same product as `Conv1D`, so that no bit changes."""
    flat_x = x.reshape(-1, x.shape[-1])
    y = torch.mm(flat_x, weight) if bias is None else torch.addmm(bias, flat_x, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


class SparseLinear(torch.autograd.Function):
    """`sparse_linear` with its backward; see the top of this file."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        positions: Tensor,
        plan: Plan,
        origin: KeptInput | None,
        read_weight: Callable[[], Tensor] | None,
    ) -> Tensor:
        # Save x uncast, so that query, key and value hold the same tensor, even under autocast.
        # Saving the blocks makes autograd refuse a backward after they have changed.
        changing = blocks if read_weight else None
        ctx.save_for_backward(weight, changing, positions, *(origin.tensors if origin else (torch.atleast_2d(x),)))
        ctx.read_weight = read_weight
        ctx.steps = origin.steps if origin else ()
        ctx.plan, ctx.master_dtype, ctx.x_shape, ctx.x_dtype = plan, blocks.dtype, x.shape, x.dtype
        if read_weight:
            weight = read_weight()
        y = _transposed_linear(x, weight, bias) if plan.grid.transposed else F.linear(x, weight, bias)
        # For autograd no view, which it would forbid models to change in place.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        weight, _, positions, *kept = ctx.saved_tensors
        needs_dx, _, needs_dbias, needs_dblocks, *_ = ctx.needs_input_grad
        flat_dy = dy.reshape(-1, dy.shape[-1])
        dx = dbias = dblocks = None
        if needs_dx:
            if ctx.read_weight:
                weight = ctx.read_weight()
            matrix = weight.t() if ctx.plan.grid.transposed else weight
            dx = torch.mm(flat_dy, matrix.to(dy.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
            # Free a dense weight that was built for this product before the next product.
            del weight, matrix
        if needs_dbias:
            dbias = flat_dy.sum(0)
        if needs_dblocks:
            x = KeptInput(tuple(kept), ctx.steps)
            dblocks = block_gradients(flat_dy, x, ctx.plan, positions).to(ctx.master_dtype)
        return dx, None, dbias, dblocks, None, None, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    positions: Tensor,
    plan: Plan,
    read_weight: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute y = x W^T + bias, with gradients for x, bias and the chosen blocks of W (SMT, equation 2).

    Args:
        x: [..., I] of any leading shape.
        weight: [O, I] the dense weight, or [I, O] where the plan's grid is transposed; receives no gradient.
        bias: [O] or None.
        blocks: [n, br, bc] the trainable blocks in stored order; receives their gradient in its own dtype.
        positions: [n * edge] int64, from `group_blocks`.
        plan: from `group_blocks`.
        read_weight: for a quantised `weight`, returns the dense one [O, I] with the blocks in it, as a new tensor.

    Returns:
        y: [..., O], in the dtype that the dense linear gives (autocast included).
    """
    return SparseLinear.apply(x, weight, bias, blocks, positions, plan, find_origin(x), read_weight)
