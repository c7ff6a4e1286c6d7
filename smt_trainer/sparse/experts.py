"""Experts that train only the chosen blocks of their matrices.

A module of experts keeps its class, its forward and its 3-D parameters, which stay frozen. It gets a child,
`smt_experts`, that holds the blocks of each matrix and watches the products that forward computes:

    experts.gate_up_proj                        [E, 2I, H] frozen, the blocks included
    experts.smt_experts.gate_up_proj.7.blocks   [n, br, bc] trained: those of expert 7
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smt_trainer.model.experts import ExpertMatrix, watch_stack
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import EXPERT_BLOCKS
from smt_trainer.model.products import Routing
from smt_trainer.model.sharded import full_tensor
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.functional.experts import ExpertBlocks, reaching, together, with_gradients
from smt_trainer.sparse.write_back import write_back


class BlockExpert(BlockModule):
    """The trained blocks of one expert's matrix.

    Attributes:
        matrix: the matrix that holds the blocks.
    """

    matrix: ExpertMatrix
    bias = None

    def __init__(self, matrix: ExpertMatrix, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> None:
        super().__init__()
        # Not a submodule: the matrix's module is an ancestor of this one.
        vars(self)["matrix"] = matrix
        self.stacked = matrix.index, len(matrix.stack)
        self.take_blocks(grid, block_indices, master_dtype)
        self.keep_indices()

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The matrix as it is stored, a view of the frozen parameter."""
        return self.matrix.weight.detach()

    @property
    def parameter(self) -> Tensor:
        return self.matrix.stack

    def base_weight(self) -> Tensor:
        return full_tensor(self.matrix.stack)[self.matrix.index]

    def to_plain(self) -> nn.Module:
        """Write the blocks into the parameter, and remove this module from that of the experts, which is returned."""
        write_back([self])
        experts, leaf, index = self.matrix.experts, self.matrix.leaf, self.matrix.index
        stacks: Any = experts.get_submodule(EXPERT_BLOCKS)
        del stacks[leaf][str(index)]
        if not len(stacks[leaf]):
            stacks[leaf].detach()
            del stacks[leaf]
        if not len(stacks):
            delattr(experts, EXPERT_BLOCKS)
        return experts

    def weight_name(self, name: str) -> str:
        return name.removesuffix(f".{self.matrix.index}")


class BlockStack(nn.ModuleDict):
    """The trained experts of one 3-D parameter, by their indices.

    Attributes:
        leaf: name of the parameter.
        aliases: expert -> an alias of its blocks (`together`), while a forward runs with a graph.
        is_reached: whether any of the aliases has been used in that forward.
    """

    def __init__(self, experts: nn.Module, leaf: str) -> None:
        super().__init__()
        self.aliases: dict[int, Tensor] = {}
        self.is_reached = False
        self.handles: list[RemovableHandle] = [
            experts.register_forward_pre_hook(self._begin),
            *watch_stack(experts, leaf, self._observe),
            experts.register_forward_hook(self._finish, always_call=True),
            experts.register_load_state_dict_pre_hook(self._read_plain),
        ]
        self.leaf = leaf

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()

    def _read_plain(self, experts: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Add to a plain model's state dict the blocks that its 3-D parameter holds."""
        stack, own = state_dict.get(f"{prefix}{self.leaf}"), f"{prefix}{EXPERT_BLOCKS}.{self.leaf}"
        if stack is None:
            return
        for linear in self.experts():
            key = f"{own}.{linear.matrix.index}.blocks"
            if key not in state_dict:
                state_dict[key] = linear.grid.gather(stack[linear.matrix.index], linear.block_indices)

    def experts(self) -> list[BlockExpert]:
        """Return the experts that have blocks."""
        return list(self.values())  # pyrefly: ignore[bad-return]

    def _begin(self, experts: nn.Module, inputs: tuple) -> None:
        if stale := [linear for linear in self.experts() if linear.is_stale()]:
            write_back(stale)
        self.is_reached = False
        if torch.is_grad_enabled():
            aliases = together([linear.blocks for linear in self.experts()])
            self.aliases = {linear.matrix.index: one for linear, one in zip(self.experts(), aliases, strict=True)}

    def _observe(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        own: dict[int, Any] = {expert: self[str(expert)] for expert in routing.among(self.aliases)}
        if not own:
            return y
        self.is_reached = True
        parts = [ExpertBlocks(expert, linear.plan, linear.positions) for expert, linear in own.items()]
        return with_gradients(y, x, routing, parts, [self.aliases[part.expert] for part in parts])

    def _finish(self, experts: nn.Module, inputs: tuple, output: Any) -> Any:
        aliases, self.aliases = self.aliases, {}
        # After an exception there is no output.
        if not aliases or self.is_reached or output is None:
            return output
        # Without a gradient, an optimizer would skip the blocks, and DDP would wait for them.
        return reaching(output, next(iter(aliases.values())))


def convert_expert(
    matrix: ExpertMatrix, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
) -> BlockExpert:
    """Rewrite a module of experts so that it trains blocks of one of its matrices."""
    experts = matrix.experts
    if not hasattr(experts, EXPERT_BLOCKS):
        experts.add_module(EXPERT_BLOCKS, nn.ModuleDict())
    stacks: Any = experts.get_submodule(EXPERT_BLOCKS)
    if matrix.leaf not in stacks:
        stacks[matrix.leaf] = BlockStack(experts, matrix.leaf)
    stacks[matrix.leaf][str(matrix.index)] = linear = BlockExpert(matrix, grid, block_indices, master_dtype)
    return linear
