"""A linear with trainable blocks whose weight tensor parallelism cuts over ranks.

Each rank holds its slice of W, and all blocks, which are few: so optimizer, clipping, checkpoint and delta work as in
one process. It writes the parts of the blocks that lie in its slice into its slice of W, and computes there

    y, dx    as the frozen slice does; transformers combines those of all ranks
    dB       of the parts of blocks in its slice, 0 elsewhere

Slices do not overlap, so the sum of dB over the ranks has one term that is not 0 for each weight: it is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.sharded import LocalPart, local_tensor
from smt_trainer.model.tensor_parallel import Slice
from smt_trainer.sparse.functional.linear import group_blocks, sparse_linear
from smt_trainer.sparse.linear import SMTLinear
from smt_trainer.sparse.write_back import write_back


class SlicedSMTLinear(SMTLinear):
    """An `nn.Linear` with trainable blocks, of whose weight this rank holds a slice.

    Attributes:
        style: how transformers cuts the weight; installs the module's `forward`.
        own_slice: this rank's slice of the weight.
        mine: [m] int64, the blocks that overlap the slice, in the order of `plan`, which uses the slice's own grid.
        within_block: the rows and the columns of a block that lie in the slice.
    """

    INDICES = (*SMTLinear.INDICES, "mine")
    is_divided = True  # pyrefly: ignore[bad-override]  # for all, and not by the weight, which may be the slice alone
    style: Any
    own_slice: Slice
    mine: Tensor
    within_block: tuple[slice, slice]

    @classmethod
    def from_plain(
        cls, linear: nn.Module, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
    ) -> SlicedSMTLinear:
        """As in `BlockModule`; a collective. The `style` of the linear must be set."""
        rewritten = super().from_plain(linear, grid, block_indices, master_dtype)
        assert isinstance(rewritten, cls)
        _reinstall(rewritten, rewritten.style)
        return rewritten

    def __deepcopy__(self, memo: dict) -> SlicedSMTLinear:
        raise SMTError(
            "a model that tensor parallelism cuts cannot be copied: the copy would compute with the weights of the "
            "original. Save the delta, and load it again: from_delta(folder, base=..., distributed_config=...)."
        )

    def take_blocks(self, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> Tensor:
        assert isinstance(self.weight, DTensor)
        self.own_slice = Slice.of(self.weight)
        block_indices = super().take_blocks(grid, block_indices, master_dtype)
        mine, places = self.own_slice.locate(grid, block_indices.numpy())
        numbers = dict(zip(map(tuple, places.tolist()), mine.tolist(), strict=True))
        self.plan, stored, positions = group_blocks(torch.from_numpy(places), self.own_slice.grid(grid))
        order = np.array([numbers[tuple(place)] for place in stored.tolist()], np.int64)
        self.within_block = self.own_slice.within_block(grid)
        self.positions = positions.to(self.blocks.device)
        self.register_buffer("mine", torch.from_numpy(order).to(self.blocks.device), persistent=False)
        return block_indices

    def product(self, input: Tensor) -> Tensor:
        if not isinstance(input, DTensor):
            # Without a graph, transformers replaces the weight by this rank's slice.
            return F.linear(input, self.weight, self.bias)
        mesh, by_rows = input.device_mesh, self.own_slice.dimension == 0
        x = input.to_local(grad_placements=[Partial()] if by_rows else input.placements)
        parts = _SliceOfBlocks.apply(self.blocks, self.mine, self.within_block, mesh.get_group())
        bias = None if self.bias is None or not by_rows else local_tensor(self.bias)
        y = sparse_linear(x, local_tensor(self.weight), bias, parts, self.positions, self.plan)
        whole = DTensor.from_local(y, mesh, [Shard(-1) if by_rows else Partial()], run_check=False)
        if by_rows or self.bias is None:
            return whole
        return whole.redistribute(placements=[Replicate()]) + self.bias

    def local_parts(self) -> list[LocalPart]:
        row, column = (self.own_slice.first, 0) if self.own_slice.dimension == 0 else (0, self.own_slice.first)
        return [LocalPart(local_tensor(self.weight).detach(), row, column)]

    def write_if_changed(self) -> None:
        """Write the blocks into this rank's slice, whether it differs or not; no collective."""
        if not self.weight.is_meta:
            write_back([self])

    def _restore(self) -> nn.Module:
        style = self.style
        for name in ("style", "own_slice", "mine", "within_block"):
            delattr(self, name)
        return _reinstall(super()._restore(), style)


def _reinstall(linear: Any, style: Any) -> nn.Module:
    """Install transformers' `forward` of a linear anew, so that it calls that of the linear's current class."""
    del linear.forward
    return style.install_forward(linear, linear.weight.device_mesh)


class _SliceOfBlocks(torch.autograd.Function):
    """The parts [m, br', bc'] of the blocks [n, br, bc] in this rank's slice, to receive their gradient."""

    @staticmethod
    def forward(
        ctx, blocks: Tensor, mine: Tensor, within_block: tuple[slice, slice], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(mine)
        ctx.within_block, ctx.group, ctx.shape = within_block, group, blocks.shape
        return blocks.new_zeros(()).expand(len(mine), *blocks[(slice(0, 1), *within_block)].shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        (mine,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        whole[(mine, *ctx.within_block)] = gradient
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None
