"""`SMTLinear` and `SMTConv1D`: linears of which only the chosen blocks are trained.

The dense weight stays where it was, frozen, and is what forward reads: no cost is added to forward or generation. The
trainable values are `blocks` [n, br, bc], a compact copy in the master dtype (float32 by default: at learning rates
around 1e-5 most bfloat16 weights would never move). After each optimizer step `write_back` casts them into the weight,
so forward always uses exactly the values that a merge writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from smt_trainer.blocks import BlockGrid
from smt_trainer.ops.sparse_linear import plan_blocks, sparse_linear


class SMTLayer(nn.Module):
    """A linear with trainable blocks. Made from an existing linear by `from_linear`, undone by `to_linear`.

    Attributes:
        weight: [O, I], or [I, O] where the grid is transposed: frozen dense weight, the chosen blocks included.
        blocks: [n, br, bc] trainable values of the chosen blocks, in the order of `block_indices`.
        block_indices: [n, 2] int32 (row, column) of each block in the grid.
        grid: the cut of the weight.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Module, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
    ) -> SMTLayer:
        """Turn a linear into a layer of this class in place: identity, hooks, state-dict keys, bias and ties stay."""
        plan, block_indices, positions = plan_blocks(block_indices.cpu(), grid)
        device = linear.weight.device
        linear.linear_class = type(linear)
        linear.__class__ = cls
        linear.grid = grid
        linear.plan = plan
        linear.weight.requires_grad_(False)
        blocks = grid.gather(linear.weight.detach(), block_indices).to(master_dtype)
        linear.blocks = nn.Parameter(blocks.contiguous())
        linear.register_buffer("block_indices", block_indices.to(device, torch.int32))
        linear.register_buffer("positions", positions.to(device), persistent=False)
        return linear

    def to_linear(self) -> nn.Module:
        """Write the blocks into the weight and become the plain linear of before, in place."""
        write_back([self])
        for name in ("blocks", "block_indices", "positions", "grid", "plan"):
            delattr(self, name)
        vars(self).pop("_views", None)
        self.__class__ = vars(self).pop("linear_class")
        return self

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(input, self.weight, self.bias, self.blocks, self.positions, self.plan)

    def weight_views(self) -> list[Tensor]:
        """A view [br, bc] of the dense weight for each block, kept until the weight's storage moves."""
        address, views = vars(self).get("_views", (None, []))
        if address != self.weight.data_ptr():
            cut = self.grid.split(self.weight.detach())
            views = [cut[row, column] for row, column in self.block_indices.tolist()]
            self._views = (self.weight.data_ptr(), views)
        return views

    def _apply(self, fn, recurse=True):
        # The views would keep the storage alive that the weight is about to leave.
        vars(self).pop("_views", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        indices = state_dict.get(f"{prefix}block_indices", self.block_indices)
        if not torch.equal(indices.to(self.block_indices), self.block_indices):
            error_msgs.append(f"{prefix}block_indices: the state dict holds other blocks than this model trains.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}blocks" in state_dict:
            write_back([self])
        else:
            self.read_back()

    @torch.no_grad()
    def read_back(self) -> None:
        """Set the blocks from the dense weight: the inverse of `write_back`, for a weight that was just loaded."""
        self.blocks.copy_(self.grid.gather(self.weight, self.block_indices))

    def extra_repr(self) -> str:
        (br, bc), (rows, columns) = self.grid.block_shape, self.grid.shape
        return (
            f"in_features={self.grid.in_features}, out_features={self.grid.out_features}, "
            f"bias={self.bias is not None}, blocks={len(self.blocks)} of {br}x{bc} (grid {rows}x{columns})"
        )


class SMTLinear(SMTLayer, nn.Linear):
    """An `nn.Linear` with trainable blocks."""


class SMTConv1D(SMTLayer):
    """A `Conv1D` of transformers with trainable blocks: its weight is [I, O], its grid transposed."""


def smt_layers(model: nn.Module) -> Iterator[tuple[str, SMTLayer]]:
    """The rewritten linears of a model with their full names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SMTLayer))


@torch.no_grad()
def write_back(layers: Iterable[SMTLayer]) -> None:
    """Cast the blocks of all layers into their dense weights, in one fused copy."""
    views, blocks = [], []
    for layer in layers:
        views += layer.weight_views()
        blocks += layer.blocks.detach().unbind(0)
    if views:
        torch._foreach_copy_(views, blocks)
