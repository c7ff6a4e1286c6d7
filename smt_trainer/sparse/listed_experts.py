"""The gradients of experts that are modules in a list, where a model is sharded over ranks.

ZeRO-2 adds up the gradients of all ranks in the order in which they come, and FSDP2 those of the parameters that have
one. A router calls other experts on each rank, in another order. So the blocks of all experts in a list get their
gradients from one node, as those in a 3-D parameter do (`sparse_experts.py`): at once, and zeros where no token was
sent.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.model.listed_experts import expert_lists
from smt_trainer.sparse.linear import BlockLinear
from smt_trainer.sparse.sparse_experts import reaching, together


@contextlib.contextmanager
def arriving_together(model: nn.Module) -> Generator[None]:
    """Let the blocks of a rewritten model's listed experts get their gradients together within this context."""
    linears: dict[nn.Module, list[BlockLinear]] = {}
    for _, experts, caller in expert_lists(model):
        found = [module for module in experts.modules() if isinstance(module, BlockLinear)]
        if found:
            linears.setdefault(caller, []).extend(found)
    handles = []
    for caller, found in linears.items():
        handles.append(caller.register_forward_pre_hook(functools.partial(_begin, found)))
        handles.append(caller.register_forward_hook(functools.partial(_end, found), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _begin(linears: list[BlockLinear], caller: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled():
        for linear, alias in zip(linears, together([linear.blocks for linear in linears]), strict=True):
            linear.alias = alias


def _end(linears: list[BlockLinear], caller: nn.Module, inputs: tuple, output: Any) -> Any:
    alias = linears[0].alias
    for linear in linears:
        linear.alias = None
    return output if alias is None else _passing(output, alias)


def _passing(output: Any, alias: Tensor) -> Any:
    """Return an output whose first tensor has a backward that passes an alias, also where no expert was called."""
    if isinstance(output, tuple):
        return (_passing(output[0], alias), *output[1:])
    return reaching(output, alias) if isinstance(output, Tensor) and output.is_floating_point() else output
