"""`BlockModule`: the base class of linears, convolutions, embeddings and experts that train only the chosen blocks.

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

from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import LocalPart, assign, full_tensor, is_sharded, local_parts
from smt_trainer.sparse.block_views import BlockViews
from smt_trainer.sparse.functional.linear import group_blocks, sparse_linear
from smt_trainer.sparse.last_equal import LastEqual, version_of, warn_of_edits
from smt_trainer.sparse.write_back import follow, write_back


class BlockModule(nn.Module):
    """A module that trains blocks of its weight. `from_plain` makes it from a plain module, `to_plain` undoes this.

    Attributes:
        weight: [O, I], or [I, O] if the grid is transposed: frozen dense weight, including the chosen blocks.
        blocks: [n, br, bc] trainable values of the chosen blocks, in the order of `block_indices`. Both this and the
            weight may be sharded over ranks.
        block_indices: [n, 2] int32 (row, column) of each block in the grid.
        grid: cuts the weight into blocks.
        positions: indices of the features that the grouped products gather.
        plan: how the products are grouped (`group_blocks`).
        last_equal: when the weight last held the values of the blocks.
        plain_class: the class that `to_plain` restores.
    """

    weight: Tensor
    bias: Tensor | None
    blocks: nn.Parameter
    block_indices: Tensor
    grid: BlockGrid
    positions: Tensor
    plan: Any
    last_equal: LastEqual
    plain_class: type[nn.Module]
    group: ClassVar[Callable[[Tensor, BlockGrid], tuple[Any, Tensor, Tensor]]] = staticmethod(group_blocks)
    # Buffers of numbers of blocks and features.
    INDICES: ClassVar[tuple[str, ...]] = ("block_indices", "positions")
    # Whether the weight holds the values of the blocks; a quantised one cannot.
    weight_holds_blocks: ClassVar[bool] = True
    # Whether the blocks have been changed without a trace, by a callback through `.data` for example. It may recur.
    changed_unseen: bool = False
    # For an expert's matrix, its index in the 3-D parameter, and the number of matrices there.
    stacked: tuple[int, int] | None = None
    _views: BlockViews | None = None
    # Replaces the blocks in forward if they get their gradient together with those of others (`listed_experts.py`).
    alias: Tensor | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds the weight: itself, or a stack of experts' matrices."""
        return self.weight

    @classmethod
    def from_plain(
        cls, linear: nn.Module, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
    ) -> BlockModule:
        """Turn a linear into this class in place; its identity, hooks, state-dict keys, bias and ties stay."""
        plain_class, linear.__class__ = type(linear), cls
        assert isinstance(linear, cls)
        linear.plain_class = plain_class
        linear.weight.requires_grad_(False)
        linear.take_blocks(grid, block_indices, master_dtype)
        linear.keep_indices()
        return linear

    def take_blocks(self, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> Tensor:
        """Copy the chosen blocks out of the weight; from now on they are written back after each optimizer step.

        Returns:
            The `block_indices` [n, 2] in stored order, on the CPU.
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

    def keep_indices(self) -> None:
        """Undo changes to the numbers of blocks and features: an average of all buffers of two models rounds them."""
        indices = vars(self).setdefault("_indices", {})
        for name in self.INDICES:
            buffer = getattr(self, name)
            if buffer.is_meta:
                continue
            values, version = indices.get(name, (None, None))
            if version == version_of(buffer):
                continue
            if values is None:
                values = buffer.to("cpu", copy=True)
            elif not torch.equal(buffer.cpu(), values):
                buffer.copy_(values)
            indices[name] = values, version_of(buffer)

    def to_plain(self) -> nn.Module:
        """Write the blocks into the weight and turn back into a plain linear, in place."""
        self.refuse_computed()
        write_back([self])
        return self._restore()

    def _restore(self) -> nn.Module:
        for name in ("blocks", "block_indices", "positions", "grid", "plan", "last_equal"):
            delattr(self, name)
        for name in ("_views", "_indices", "changed_unseen"):
            vars(self).pop(name, None)
        self.__class__ = vars(self).pop("plain_class")
        return self

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.is_stale():
            write_back([self])
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Compute the output, with a backward that forms only the chosen blocks of the weight's gradient."""
        blocks = self.blocks if self.alias is None else self.alias
        return sparse_linear(input, self.weight, self.bias, blocks, self.positions, self.plan)

    def train(self, mode: bool = True) -> BlockModule:
        """Set the mode. Before evaluation, write the blocks: an averaging callback may have changed them."""
        if not mode:
            self.write_if_changed()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.write_if_changed()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def write_if_changed(self) -> None:
        """Write the blocks into the weight if it `differs` from them, or take over what was edited in the weight.

        Otherwise it is not touched: autograd refuses backward through a weight that was written since forward.
        """
        self.refuse_computed()
        if not self.is_comparable:
            return
        if not self.differs():
            self.mark_written()
        elif self.last_equal.weight_was_edited(self):
            self.take_edits()
        else:
            self.changed_unseen = self.changed_unseen or not self.last_equal.blocks_were_changed(self)
            write_back([self])
        self.last_equal.note_checksum(self)

    @property
    def is_comparable(self) -> bool:
        """Whether the weight can be compared with the blocks: it is no collective, and they have values."""
        is_whole = not is_sharded(self.blocks) and not is_sharded(self.parameter)
        return is_whole and not self.parameter.is_meta and self.weight_holds_blocks

    def differs(self) -> bool:
        """Return whether the weight has other values than the blocks; False if it is not comparable."""
        if not self.is_comparable:
            return False
        self.keep_indices()
        return bool(self.difference())

    def difference(self) -> Tensor:
        """Return whether a comparable weight has other values than the blocks, on its device: reading it waits."""
        held = self.grid.gather(self.base_weight(), self.block_indices)
        return (held != self.blocks.detach().to(held.dtype)).any()

    @torch.no_grad()
    def take_edits(self) -> None:
        """Take over into the blocks the values that were edited in the weight; the others keep their precision."""
        held = self.grid.gather(self.base_weight(), self.block_indices)
        edited = held != self.blocks.to(held.dtype)
        if edited.any():
            self.blocks.copy_(torch.where(edited, held.to(self.blocks.dtype), self.blocks))
            warn_of_edits()
        self.mark_written()

    def __getstate__(self) -> dict[str, Any]:
        # Each view would be stored with the whole weight.
        return vars(self) | {"_views": None}

    def __setstate__(self, state) -> None:
        # A copy of the model is followed as the original is.
        super().__setstate__(state)
        if self.weight_holds_blocks and not is_sharded(self.blocks):
            self.last_equal = LastEqual.in_a_copy(self)
        follow(self)

    def refuse_computed(self) -> None:
        """Raise `SMTError` if pruning or a parametrization computes the weight now: it would undo each change."""
        if self.stacked is None and "weight" not in self._parameters:
            raise SMTError(
                "the weight of a linear with blocks is no parameter any more: pruning or a parametrization computes it "
                "from another one. Prune before the blocks are chosen, or after merging (merge_and_unload)."
            )

    def mark_written(self) -> None:
        """Record that the weight holds the current blocks."""
        self.last_equal = LastEqual.of(self)

    def is_stale(self) -> bool:
        """Return whether the blocks have values that the weight lacks, as far as forward can tell cheaply.

        It sees changes by an operation, and other blocks in their place (`torch.func.functional_call`). Changes through
        `.data` or by a fused optimizer are seen only after `write_if_changed` has found such a change before. Sharded
        blocks are gathered in forward, so they are not written there (`write_back.py`). What an operation has edited in
        the weight is taken over first.
        """
        self.refuse_computed()
        self.keep_indices()
        if self.last_equal.blocks_were_changed(self):
            return True
        if is_sharded(self.last_equal.blocks):
            return False
        if self.last_equal.weight_was_written(self):
            self.take_edits()
        replaced = self.last_equal.blocks is not self.blocks
        if not replaced and not self.blocks.requires_grad:
            # An adapter that is trained on top may be merged into the weight later.
            self.last_equal.note_checksum(self)
        return (replaced or self.changed_unseen or self.blocks.is_inference()) and self.differs()

    @property
    def is_divided(self) -> bool:
        """Whether this rank holds only parts of the weight."""
        return is_sharded(self.parameter)

    def local_parts(self) -> list[LocalPart]:
        """Return views of the parts of the weight on this rank."""
        return local_parts(self.parameter, self.grid.stored_columns)

    def views(self) -> BlockViews:
        """Return views of this rank's parts of the dense weight at the places of the blocks."""
        parts = self.local_parts()
        if self._views is None or not self._views.are_of(parts):
            self._views = BlockViews.of(self, parts)
        return self._views

    def _apply(self, fn, recurse=True):
        # The views would keep the old storage of the weight alive.
        self._views = None
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
        self.keep_indices()
        rows, columns = self.block_indices.long().cpu().unbind(1)
        return torch.argsort(rows * self.grid.shape[1] + columns)

    def extra_repr(self) -> str:
        (br, bc), (rows, columns) = self.grid.block_shape, self.grid.shape
        # Conv1D and experts have none.
        plain = super().extra_repr() or (
            f"in_features={self.grid.in_features}, out_features={self.grid.out_features}, bias={self.bias is not None}"
        )
        return f"{plain}, blocks={len(self.blocks)} of {br}x{bc} (grid {rows}x{columns})"


def block_modules(model: nn.Module) -> Iterator[tuple[str, BlockModule]]:
    """Yield full name and module of every `BlockModule` in the model's order; the names leave out wrappers."""
    return ((plain_name(name), module) for name, module in model.named_modules() if isinstance(module, BlockModule))
