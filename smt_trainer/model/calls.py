"""Observe the calls of targets: their inputs x [..., I], and in backward the gradients dy [..., O] of their outputs.

A linear is observed by a hook, an expert's matrix through the products that its module computes (`products.py`). For
an expert, x and dy are the rows [T_e, .] of the tokens routed to it; a product with no such row is not reported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smt_trainer.model.experts import ExpertMatrix, watch_stack
from smt_trainer.model.products import Observer, Routing

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

# Takes name, target and x of a call; returns a function that takes dy, or None.
Observe = Callable[[str, "Target", Tensor], Callable[[Tensor], None] | None]


@contextlib.contextmanager
def watching_calls(targets: Mapping[str, Target], observe: Observe, *, start: bool = False) -> Generator[None]:
    """Observe the calls of targets within this context.

    Args:
        targets: by name.
        observe: called with name, target and x of each call. Backward calls the function that it returns with dy.
        start: whether to make outputs require a gradient if they do not, as when all weights are frozen. Then dy is the
            gradient of the target's own output, whatever the hooks of users make of it.
    """
    handles = []
    try:
        for name, target in targets.items():
            if isinstance(target, nn.Module):
                watch = functools.partial(_watch, name, observe, start)
                # One that starts the graph runs before the hooks of users, which may change the output.
                handles.append(target.register_forward_hook(watch, with_kwargs=True, prepend=start))
        experts = {name: target for name, target in targets.items() if isinstance(target, ExpertMatrix)}
        with _watching_products(experts, lambda names: _observer(experts, names, observe, start)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    name: str,
    observe: Observe,
    start: bool,
    linear: Any,
    inputs: tuple[Tensor, ...],
    named: dict[str, Tensor],
    output: Tensor,
):
    (x,) = (*inputs, *named.values())
    take = observe(name, linear, x.detach())
    if take is None or not _can_start(output, start):
        return None
    started = _started(output)
    started.register_hook(take)
    return started


@contextlib.contextmanager
def _watching_products(
    matrices: Mapping[str, ExpertMatrix], observer: Callable[[dict[int, str]], Observer]
) -> Generator[None]:
    """Report the matrix products of experts within this context.

    Args:
        matrices: target name -> matrix; products of other parameters are not reported.
        observer: makes an observer for a parameter from {expert: target name}.
    """
    stacks: dict[tuple[nn.Module, str], dict[int, str]] = {}
    for name, matrix in matrices.items():
        stacks.setdefault((matrix.experts, matrix.leaf), {})[matrix.index] = name
    handles = []
    try:
        for (experts, leaf), names in stacks.items():
            handles += watch_stack(experts, leaf, observer(names))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(
    matrices: Mapping[str, ExpertMatrix], names: Mapping[int, str], observe: Observe, start: bool
) -> Observer:
    """Return an observer for the products of one parameter, from {expert: target name}."""

    def observe_product(x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        takes = {}
        for expert in routing.among(names):
            if len(rows := routing.rows(expert, x.detach())):
                takes[expert] = observe(names[expert], matrices[names[expert]], rows)
        takes = {expert: take for expert, take in takes.items() if take is not None}
        if not takes or not _can_start(y, start):
            return y
        started = _started(y)

        def take_all(dy: Tensor) -> None:
            for expert, take in takes.items():
                take(routing.rows(expert, dy))

        started.register_hook(take_all)
        return started

    return observe_product


def _can_start(output: Tensor, start: bool) -> bool:
    # Reentrant checkpointing first runs forward without a graph.
    return torch.is_grad_enabled() and (start or output.requires_grad)


def _started(output: Tensor) -> Tensor:
    return output if output.requires_grad else _Started.apply(output.detach(), torch.ones((), requires_grad=True))


class _Started(torch.autograd.Function):
    """Makes a tensor require a gradient but, unlike a leaf, still allows in-place changes."""

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        return None, None
