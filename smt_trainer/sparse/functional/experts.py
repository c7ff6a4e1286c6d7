"""Add the gradient of experts' chosen blocks to the products that the model itself computes.

The model computes a product y of some experts (`model/products.py`), and its dx, with the frozen weights as usual. Let
x_e and dy_e [T_e, .] be the rows that belong to expert e. Its blocks get, like those of a linear (`linear.py`),

    dW_e[r, c] = dy_e[:, r-th block row]^T  x_e[:, c-th block column]          [br, bc]

`with_gradients` adds this to the graph of y. It changes no value. The blocks of all experts enter the graph through one
node (`together`), which backward always reaches (`reaching`): so they get their gradients at once, zeros where no token
was sent, in an order that does not depend on the router. ZeRO-2 reduces gradients over ranks in the order in which they
arrive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_trainer.model.products import Routing
from smt_trainer.sparse.functional.kept_input import KeptInput, find_origin
from smt_trainer.sparse.functional.linear import Plan, block_gradients


class ExpertBlocks(NamedTuple):
    """The trained blocks of one expert: how they are grouped, and their positions (`group_blocks`)."""

    expert: int
    plan: Plan
    positions: Tensor


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, routing: Routing, parts: Sequence[ExpertBlocks], *blocks: Tensor) -> Tensor:
        # Each row of a 2-D input is one token's.
        origin = find_origin(x) if x.ndim == 2 else None
        ctx.save_for_backward(*(origin.tensors if origin else (x,)))
        ctx.steps = origin.steps if origin else ()
        ctx.routing, ctx.parts, ctx.master_dtypes = routing, parts, [each.dtype for each in blocks]
        # Nothing else refers to the product yet. The model may change it in place later, which a view would not allow.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        gradients, kept = [], KeptInput(ctx.saved_tensors, ctx.steps)
        for (expert, plan, positions), dtype in zip(ctx.parts, ctx.master_dtypes, strict=True):
            rows = functools.partial(ctx.routing.rows, expert)
            gradients.append(block_gradients(rows(dy), kept.some(rows), plan, positions).to(dtype))
        return dy, None, None, None, *gradients


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *blocks: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.view_as(each) for each in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one per output
        # torch passes zeros for aliases that got no gradient.
        return gradients


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, alias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        return dy, None


def with_gradients(
    y: Tensor, x: Tensor, routing: Routing, parts: Sequence[ExpertBlocks], blocks: Sequence[Tensor]
) -> Tensor:
    """Return y, with gradients for the blocks of experts.

    Args:
        y: product of x and the experts' weights, just computed.
        x: its input, in any of the shapes of `model/products.py`.
        routing: which rows belong to which expert.
        parts: the experts with blocks.
        blocks: for each of `parts`, an alias of its blocks [n, br, bc] in stored order; receives the gradient in its
            own dtype.
    """
    return _WithGradients.apply(y, x, routing, parts, *blocks)


def together(blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return aliases of blocks; the blocks get their gradients together, after backward through all uses of these."""
    return _Together.apply(*blocks)


def reaching(y: Tensor, alias: Tensor) -> Tensor:
    """Return y connected to an alias that it does not depend on, so that backward reaches the alias."""
    return _Reaching.apply(y, alias)
