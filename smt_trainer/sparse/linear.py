"""`SMTLinear` and `SMTConv1D`: linears that train only the chosen blocks.

Forward reads the dense weight, which stays in place, frozen; so forward and generation cost no more than before. The
trainable values are `blocks` [n, br, bc], a compact copy in the master dtype (float32 by default: at learning rates
around 1e-5 most bfloat16 weights would never change). `write_back.py` casts them into the weight whenever they change,
so forward uses exactly the values that a merge writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import Part, assign, full_tensor, is_sharded, local_parts
from smt_trainer.sparse.sparse_linear import group_blocks, sparse_linear
from smt_trainer.sparse.write_back import follow, write_back


class BlockLinear(nn.Module):
    """A linear with trainable blocks. `from_linear` makes it from an existing linear, `to_linear` undoes this.

    Attributes:
        weight: [O, I], or [I, O] if the grid is transposed: frozen dense weight, including the chosen blocks.
        blocks: [n, br, bc] trainable values of the chosen blocks, in the order of `block_indices`. Both this and the
            weight may be sharded over ranks.
        block_indices: [n, 2] int32 (row, column) of each block in the grid.
        grid: cuts the weight into blocks.
        positions: the features that the grouped products gather; `plan` is how blocks are grouped (`group_blocks`).
        linear_class: what `to_linear` restores.
    """

    weight: Tensor
    bias: Tensor | None
    blocks: nn.Parameter
    block_indices: Tensor
    grid: BlockGrid
    positions: Tensor
    plan: Any
    linear_class: type[nn.Module]
    group: ClassVar[Callable[[Tensor, BlockGrid], tuple[Any, Tensor, Tensor]]] = staticmethod(group_blocks)
    # Whether the weight holds the values of the blocks; a quantised one cannot.
    is_written: ClassVar[bool] = True
    # Whether something has changed the blocks without a trace, such as a callback through `.data`; it may do so again.
    leaves_no_trace: bool = False
    # Of an expert's matrix, its place among those in one parameter, and their number.
    stacked: tuple[int, int] | None = None
    # Stands for the blocks in forward, where they get their gradient together with others (`listed_experts.py`).
    alias: Tensor | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds the weight: itself, or a stack of experts' matrices."""
        return self.weight

    @classmethod
    def from_linear(
        cls, linear: nn.Module, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
    ) -> BlockLinear:
        """Turn a linear into this class in place; its identity, hooks, state-dict keys, bias and ties stay."""
        linear_class, linear.__class__ = type(linear), cls
        assert isinstance(linear, cls)
        linear.linear_class = linear_class
        linear.weight.requires_grad_(False)
        linear.hold(grid, block_indices, master_dtype)
        return linear

    def hold(self, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> Tensor:
        """Take the chosen blocks out of the weight, and write them back after each step of an optimizer.

        Returns:
            Their positions [n, 2] in stored order, on the CPU.
        """
        self.grid = grid
        self.plan, block_indices, positions = type(self).group(block_indices.cpu(), grid)
        blocks = grid.gather(self.base_weight(), block_indices).to(master_dtype)
        self.blocks = nn.Parameter(blocks.contiguous())
        self.mark_written()
        follow(self)
        device = self.weight.device
        self.register_buffer("block_indices", block_indices.to(device, torch.int32))
        self.register_buffer("positions", positions.to(device), persistent=False)
        return block_indices

    def base_weight(self) -> Tensor:
        """Return the whole dense weight, in `weight_dtype`."""
        return full_tensor(self.weight)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which forward uses the blocks."""
        return self.parameter.dtype

    def merged_weight(self) -> Tensor:
        """Return the whole dense weight with the blocks in it, in `weight_dtype`."""
        write_back([self])
        return self.base_weight()

    def to_linear(self) -> nn.Module:
        """Write the blocks into the weight and turn back into a plain linear, in place."""
        write_back([self])
        return self._restore()

    def _restore(self) -> nn.Module:
        for name in ("blocks", "block_indices", "positions", "grid", "plan", "_written"):
            delattr(self, name)
        for name in ("_views", "leaves_no_trace"):
            vars(self).pop(name, None)
        self.__class__ = vars(self).pop("linear_class")
        return self

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.is_stale():
            write_back([self])
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Return y of x, with a backward that forms only the chosen blocks of the weight's gradient."""
        blocks = self.blocks if self.alias is None else self.alias
        return sparse_linear(input, self.weight, self.bias, blocks, self.positions, self.plan)

    def train(self, mode: bool = True) -> BlockLinear:
        """Set the mode. Before evaluation, write the blocks: an averaging callback may have changed them."""
        if not mode:
            self.write_if_whole()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.write_if_whole()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def write_if_whole(self) -> None:
        """Write the blocks if the weight has other values, unless that is a collective or there are no values.

        A weight that has them stays untouched: autograd refuses to go back through one that was written since.
        """
        if self.differs():
            self.leaves_no_trace = self.leaves_no_trace or not self._has_trace()
            write_back([self])

    def differs(self) -> bool:
        """Return whether the weight has other values than the blocks; False where finding out is a collective, or there
        are no values."""
        if is_sharded(self.blocks) or is_sharded(self.parameter) or self.parameter.is_meta or not self.is_written:
            return False
        held = self.grid.gather(self.base_weight(), self.block_indices)
        return not torch.equal(held, self.blocks.detach().to(held.dtype))

    def __setstate__(self, state) -> None:
        # A copy of the model is followed as the original is. Its blocks count their changes anew.
        super().__setstate__(state)
        if self.is_written and not is_sharded(self.blocks):
            self._written = self.blocks, -1
        follow(self)

    def mark_written(self) -> None:
        """Record that the weight holds the current blocks."""
        self._written = self.blocks, self.blocks._version

    def is_stale(self) -> bool:
        """Return whether the weight lacks values of the blocks, as far as a forward can tell.

        Seen are changes by an operation, and other blocks in their place (`torch.func.functional_call`). Changes
        through `.data`, and those that a fused optimizer makes, are seen only once `write_if_whole` has found some.
        Sharded blocks, which forward sees gathered, are written by others.
        """
        if self._has_trace():
            return True
        written, _ = self._written
        replaced = written is not self.blocks and not is_sharded(written)
        return (replaced or self.leaves_no_trace) and self.differs()

    def _has_trace(self) -> bool:
        """Return whether an operation has changed the blocks since they were written into the weight."""
        written, version = self._written
        return written is self.blocks and version != written._version

    @property
    def is_divided(self) -> bool:
        """Whether this rank holds only parts of the weight."""
        return is_sharded(self.parameter)

    def local_parts(self) -> list[Part]:
        """Return views of what this rank holds of the weight."""
        return local_parts(self.parameter, self.grid.stored_columns)

    def cut(self, blocks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of this rank's part of the dense weight under the blocks, and the part of `blocks` [n, br, bc]
        that belongs in each view."""
        parts = self.local_parts()
        addresses = [part.values.data_ptr() for part in parts]
        if vars(self).get("_views", (None,))[0] != addresses:
            self._views = (addresses, *self._cut(parts))
        _, views, cuts = self._views
        whole = blocks.unbind(0)
        return views, list(whole) if cuts is None else [whole[block][rows, columns] for block, rows, columns in cuts]

    def _cut(self, parts: list[Part]) -> tuple[list[Tensor], list[tuple[int, slice, slice]] | None]:
        """Return views of the parts under the blocks, and the block, rows and columns of each; None: all whole."""
        indices = self.block_indices.tolist()
        if not self.is_divided:
            return self.grid.views(self.weight.detach(), indices), None
        br, bc = self.grid.block_shape
        # The matrices of a stack lie below each other.
        above = (self.stacked[0] if self.stacked else 0) * self.grid.stored_shape[0]
        views, cuts = [], []
        for values, row, column in parts:
            row -= above
            if self.grid.transposed:
                values, row, column = values.t(), column, row
            for block, (r, c) in enumerate(indices):
                top, left = row - r * br, column - c * bc
                rows = slice(max(top, 0), min(top + values.shape[0], br))
                columns = slice(max(left, 0), min(left + values.shape[1], bc))
                if rows.start < rows.stop and columns.start < columns.stop:
                    views.append(values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left])
                    cuts.append((block, rows, columns))
        return views, cuts

    def _apply(self, fn, recurse=True):
        # The views would keep the old storage of the weight alive.
        vars(self).pop("_views", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        indices = state_dict.get(f"{prefix}block_indices")
        if indices is not None and not torch.equal(indices.to(self.block_indices), self.block_indices):
            error_msgs.append(f"{prefix}block_indices: the state dict holds other blocks than this model trains.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # On the meta device, accelerate fills the model later; the trainer writes back when it is complete.
        if self.block_indices.is_meta:
            return
        if f"{prefix}blocks" in state_dict:
            write_back([self])
        elif f"{prefix}weight" in state_dict:
            self.read_back()

    def weight_name(self, name: str) -> str:
        """Return the name of the dense weight in the model, from the name of this target."""
        return f"{name}.weight"

    @torch.no_grad()
    def read_back(self) -> None:
        """Set the blocks from a dense weight that was just loaded: the inverse of `write_back`."""
        assign(self.blocks, self.grid.gather(self.base_weight(), self.block_indices))

    def row_major_order(self) -> Tensor:
        """Return [n] int64 on the CPU: the order that sorts the blocks row by row, as in selections and deltas."""
        rows, columns = self.block_indices.long().cpu().unbind(1)
        return torch.argsort(rows * self.grid.shape[1] + columns)

    def extra_repr(self) -> str:
        (br, bc), (rows, columns) = self.grid.block_shape, self.grid.shape
        return (
            f"in_features={self.grid.in_features}, out_features={self.grid.out_features}, "
            f"bias={self.bias is not None}, blocks={len(self.blocks)} of {br}x{bc} (grid {rows}x{columns})"
        )


class SMTLinear(BlockLinear, nn.Linear):  # pyrefly: ignore[inconsistent-inheritance]  # torch forgets `bias=None`
    """An `nn.Linear` with trainable blocks."""


class SMTConv1D(BlockLinear):
    """A `Conv1D` of transformers with trainable blocks; its weight is [I, O] and its grid transposed."""


def smt_linears(model: nn.Module) -> Iterator[tuple[str, BlockLinear]]:
    """Yield a model's rewritten linears with their full names, without the names of wrappers, in the model's order."""
    return ((plain_name(name), module) for name, module in model.named_modules() if isinstance(module, BlockLinear))
