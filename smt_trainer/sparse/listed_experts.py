"""Deliver the gradients of experts that are modules in a list together, where a model is sharded over ranks.

ZeRO-2 reduces gradients over ranks in the order in which they arrive, and FSDP2 reduces those of the parameters that
have one. But a router calls different experts on each rank, in a different order. So the blocks of all experts in a
list get their gradients from one node, like those in a 3-D parameter (`functional/experts.py`): all at once, and zeros
where no token was sent.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.model.listed_experts import expert_lists
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.functional.experts import reaching, together


@contextlib.contextmanager
def arriving_together(model: nn.Module) -> Generator[None]:
    """Make the blocks of a rewritten model's listed experts get their gradients together within this context."""
    linears: dict[nn.Module, list[BlockModule]] = {}
    for _, experts, caller in expert_lists(model):
        found = [module for module in experts.modules() if isinstance(module, BlockModule)]
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


def _begin(linears: list[BlockModule], caller: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled():
        for linear, alias in zip(linears, together([linear.blocks for linear in linears]), strict=True):
            linear.alias = alias


def _end(linears: list[BlockModule], caller: nn.Module, inputs: tuple, output: Any) -> Any:
    alias = linears[0].alias
    for linear in linears:
        linear.alias = None
    return output if alias is None else _passing(output, alias)


def _passing(output: Any, alias: Tensor) -> Any:
    """Return an output whose first tensor is connected to an alias in the graph, even if no expert was called."""
    if isinstance(output, tuple):
        return (_passing(output[0], alias), *output[1:])
    return reaching(output, alias) if isinstance(output, Tensor) and output.is_floating_point() else output
