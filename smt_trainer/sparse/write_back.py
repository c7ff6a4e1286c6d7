"""Write the trained blocks into the dense weights, which forward reads.

This happens wherever the two could differ, whoever changed the blocks:

    after the step of any optimizer of the process that holds them     a hook (`follow`), for any trainer or loop
    in a forward that finds that an operation has changed them         by their version (`BlockModule.is_stale`)
    before evaluation and before a state dict is made                  for changes that leave no trace (`.data`); from
                                                                       then on every forward compares
    before each forward of a trainer with callbacks or methods of       for those, too (`training/write_back.py`)
    the user's

What others write into the weight goes the other way: the blocks take it over (`last_equal.py`).

Sharded blocks are written by the hook alone, and by the trainer under DeepSpeed, whose optimizer holds other tensors.
A quantised weight holds no blocks: there forward reads the blocks themselves (`quantised_linear.py`).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from smt_trainer.model.sharded import full_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from smt_trainer.model.grid import BlockGrid
    from smt_trainer.sparse.block_module import BlockModule

# On the CPU, `write_back` copies blocks of at least this many weights one by one.
LARGE_BLOCK = 2048

# In the order of rewriting, which is the same on all ranks: writing sharded blocks is a collective.
_followed: weakref.WeakValueDictionary[int, BlockModule] = weakref.WeakValueDictionary()
_places = itertools.count()


@torch.no_grad()
def write_back(linears: Iterable[BlockModule]) -> None:
    """Cast the blocks of rewritten linears into their dense weights; a single collective when they are sharded.

    On the CPU, one fused copy to views of the weights writes all large blocks. Small blocks cost more to view than to
    copy, and a GPU has no fused copy to strided views: in both cases each weight takes one indexed copy.
    """
    linears = [linear for linear in linears if linear.weight_holds_blocks]
    for linear in linears:
        linear.keep_indices()
    views, values = [], []
    for linear, blocks in zip(linears, full_tensors([linear.blocks for linear in linears]), strict=True):
        if one_by_one(linear.grid, blocks) or linear.is_divided:
            under_blocks = linear.views()
            views += under_blocks.views
            values += under_blocks.parts_of(blocks)
        else:
            linear.grid.scatter_(linear.weight, linear.block_indices, blocks)
    if views:
        torch._foreach_copy_(views, values)
    for linear in linears:
        linear.mark_written()


def write_what_differs(linears: Iterable[BlockModule]) -> None:
    """Write back the linears whose weights have other values than their blocks. All are compared before the first
    result is read, since a GPU is waited for then."""
    comparable = [linear for linear in linears if linear.is_comparable]
    for linear, differs in zip(comparable, [linear.difference() for linear in comparable], strict=True):
        if differs:
            linear.write_if_changed()


def one_by_one(grid: BlockGrid, values: Tensor) -> bool:
    """Return whether blocks are best copied one by one, through views of their weight; False for a convolution, whose
    blocks may have no such views."""
    return not grid.kernel and grid.block_numel >= LARGE_BLOCK and values.device.type == "cpu"


def follow(linear: BlockModule) -> None:
    """Write the blocks of a rewritten linear back after each step of an optimizer that holds them."""
    _install_hook()
    _followed[next(_places)] = linear


@functools.cache
def _install_hook() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args, kwargs) -> None:
    if not _followed:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # A linear that was made plain and rewritten again is followed twice.
    followed = dict.fromkeys(_followed.values())
    write_back(linear for linear in followed if id(getattr(linear, "blocks", None)) in stepped)
