"""What all scorers have in common."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.model.grid import BlockGrid


class Scorer(ABC):
    """Scores the blocks of the targets, if need be from what it sees of forward and backward while `attached`.

    Attributes:
        needs_warmup: whether it looks at batches at all.
        needs_backward: whether a step of the warm-up runs backward; if not, forward runs without a graph.

    Args:
        targets: module name -> linear, in the model's order.
        grids: module name -> grid.
        config: the configuration; a scorer reads its own fields only.
        seed: for scores that draw.
    """

    needs_warmup: ClassVar[bool] = True
    needs_backward: ClassVar[bool] = True

    @classmethod
    def class_column(cls, config: SMTConfig) -> str | None:
        """Column of the training data that the scorer reads classes from; None if it reads none."""
        return None

    def __init__(
        self, targets: Mapping[str, nn.Module], grids: Mapping[str, BlockGrid], config: SMTConfig, seed: int
    ) -> None:
        self.targets, self.grids, self.config, self.seed = targets, grids, config, seed

    @contextlib.contextmanager
    def attached(self, hold: bool = False) -> Iterator[None]:
        """Observe the targets within this context; all hooks are gone after it, also after an exception.

        With `hold`, what an optimizer step contributes is kept apart until the caller takes it by `take_step`.
        """
        yield

    def begin_batch(self, inputs: MutableMapping[str, Any]) -> None:
        """Told of each micro-batch before its forward; takes out of it what is not meant for the model."""
        return

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        """Each sum and what the step that was just run contributes to it; the scorer forgets the latter.

        Contributions of gradients are floating point, and as large as the loss is scaled; counts are integers.
        """
        return []

    def statistics(self) -> Iterator[Tensor]:
        """What was summed so far, one tensor at a time: linear in the data, so ranks may average it in place."""
        yield from ()

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Module name -> scores [R, C], float32 on the CPU, in the model's order."""


@contextlib.contextmanager
def weight_gradients(targets: Mapping[str, nn.Module], consume: Callable[[str, Tensor], None] | None) -> Iterator[None]:
    """Within this context the targets' weights ask for a gradient.

    `consume` is called with the name of a module and its weight once each backward has formed `weight.grad`, which is
    freed at once: one gradient is alive at a time. Without it they stay, and accumulate.
    """
    handles = []
    try:
        for name, linear in targets.items():
            linear.weight.requires_grad_(True)
            linear.weight.grad = None
            if consume is not None:
                drain = functools.partial(_drain, name, consume)
                handles.append(linear.weight.register_post_accumulate_grad_hook(drain))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for linear in targets.values():
            linear.weight.requires_grad_(False)
            linear.weight.grad = None


def _drain(name: str, consume: Callable[[str, Tensor], None], weight: Tensor) -> None:
    consume(name, weight)
    weight.grad = None


@contextlib.contextmanager
def output_gradients(
    targets: Mapping[str, nn.Module], observe: Callable[[str, nn.Module, Tensor], Callable[[Tensor], None]]
) -> Iterator[None]:
    """Within this context, `observe` is called with a module's name, the module and its input x at each of its calls;
    what it returns is called in backward with the gradient dy of the module's output. No weight gradient is formed."""
    handles = []
    try:
        for name, linear in targets.items():
            handles.append(linear.register_forward_hook(functools.partial(_watch, name, observe)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, observe: Callable, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor):
    # Reentrant checkpointing runs forward without a graph first.
    if not torch.is_grad_enabled():
        return None
    # With all weights frozen nothing asks for a gradient at the lowest target; a leaf in its place does.
    started = output if output.requires_grad else output.detach().requires_grad_(True)
    started.register_hook(observe(name, linear, inputs[0].detach()))
    return started
