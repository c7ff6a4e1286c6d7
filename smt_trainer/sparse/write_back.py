"""Write the trained blocks into the dense weights, which forward reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from smt_trainer.model.sharded import full_tensors, is_sharded

if TYPE_CHECKING:
    from smt_trainer.sparse.linear import BlockLinear

# Weights in a block from which `write_back` copies block by block on the CPU.
LARGE_BLOCK = 2048


@torch.no_grad()
def write_back(linears: Iterable[BlockLinear]) -> None:
    """Cast the blocks of rewritten linears into their dense weights; a single collective when they are sharded.

    On the CPU all large blocks are one fused copy to views of the weights. Small ones cost more to view than to copy,
    and a GPU has no fused copy to strided views: there each weight takes one indexed copy.
    """
    linears = list(linears)
    views, values = [], []
    for linear, blocks in zip(linears, full_tensors([linear.blocks for linear in linears]), strict=True):
        is_large = linear.grid.block_numel >= LARGE_BLOCK and blocks.device.type == "cpu"
        if is_large or is_sharded(linear.weight):
            linear_views, linear_values = linear.cut(blocks)
            views += linear_views
            values += linear_values
        else:
            linear.grid.scatter_(linear.weight, linear.block_indices, blocks)
    if views:
        torch._foreach_copy_(views, values)
    for linear in linears:
        linear.mark_written()
