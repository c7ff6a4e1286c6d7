"""Define the base class of scorers, and how they observe gradients."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.model.calls import watching_calls
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import stores_transpose
from smt_trainer.model.quantised import is_quantised

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target


class Scorer(ABC):
    """Scores the blocks of the targets; most scorers observe forward and backward while `attached`.

    Attributes:
        needs_warmup: whether the scorer needs batches.
        needs_backward: whether a warm-up step runs backward; if not, forward runs without a graph.
        needs_running_statistics: whether batch normalisation must use its running statistics, as in evaluation.
        needs_all_features: whether it reads inputs or outputs of linears, which tensor parallelism splits by features
            over ranks.

    Args:
        targets: name -> linear or expert's matrix, in the model's order.
        grids: module name -> grid.
        config: the configuration; a scorer reads its own fields only.
        seed: for random scores.
    """

    needs_warmup: ClassVar[bool] = True
    needs_backward: ClassVar[bool] = True
    needs_running_statistics: ClassVar[bool] = False
    needs_all_features: ClassVar[bool] = False

    @classmethod
    def class_column(cls, config: SMTConfig) -> str | None:
        """Column of the training data that the scorer reads classes from; None if it reads none."""
        return None

    def __init__(
        self, targets: Mapping[str, Target], grids: Mapping[str, BlockGrid], config: SMTConfig, seed: int
    ) -> None:
        self.targets, self.grids, self.config, self.seed = targets, grids, config, seed
        # Whether each token predicts the next one, so that the first has no loss.
        self.predicts_next = False

    @contextlib.contextmanager
    def attached(self, by_step: bool = False) -> Generator[None]:
        """Observe the targets within this context; remove all hooks at its end, even after an exception.

        With `by_step`, keep each optimizer step's contribution apart until the caller takes it with `take_step`.
        """
        yield

    def begin_batch(self, inputs: MutableMapping[str, Any]) -> None:
        """Inspect a micro-batch before its forward, and remove from it what the model does not accept."""
        return

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        """Return each sum with the last step's contribution to it, and reset the contributions.

        Contributions of gradients are floating point and include the loss scale; counts are integers.
        """
        return []

    def statistics(self) -> Iterator[Tensor]:
        """Yield the sums so far, one at a time; they are linear in the data, so ranks may average them in place."""
        yield from ()

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Return module name -> scores [R, C], float32 on the CPU, in the model's order."""


@contextlib.contextmanager
def weight_gradients(targets: Mapping[str, Target], consume: Callable[[str, Tensor], None]) -> Generator[None]:
    """Compute the gradients of the targets' weights within this context.

    Whenever backward has computed one, call `consume` with the module's name and the gradient, then free it: only one
    is alive at a time. Plain weights require a gradient within this context; their own `.grad` is restored afterwards.
    Quantised weights cannot require one, and autograd would compute experts' gradients all together: for these two, the
    gradient is computed as dy^T x of each product.
    """
    handles, before = [], {}
    plain = {name: target for name, target in targets.items() if isinstance(target, nn.Module)}
    plain = {name: linear for name, linear in plain.items() if not is_quantised(linear)}
    others = {name: target for name, target in targets.items() if name not in plain}
    try:
        for name, linear in plain.items():
            linear.weight.requires_grad_(True)
            before[name], linear.weight.grad = linear.weight.grad, None
            drain = functools.partial(_drain, name, consume)
            handles.append(linear.weight.register_post_accumulate_grad_hook(drain))
        with output_gradients(others, functools.partial(_multiply, consume)):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, linear in plain.items():
            linear.weight.requires_grad_(False)
            linear.weight.grad = before.get(name)


def _drain(name: str, consume: Callable[[str, Tensor], None], weight: Tensor) -> None:
    if weight.grad is not None:
        consume(name, weight.grad)
    weight.grad = None


def _multiply(consume: Callable[[str, Tensor], None], name: str, target: Target, x: Tensor) -> Callable[[Tensor], None]:
    kept = keep_for_backward(x)

    def form(dy: Tensor) -> None:
        # This function must not hold x itself, which checkpointing or offloading may free.
        consume(name, product_gradient(target, kept().to(dy.dtype), dy))

    return form


def product_gradient(target: Target, x: Tensor, dy: Tensor) -> Tensor:
    """Return dy^T x of inputs x [..., I] and the gradients dy [..., O] of their outputs, shaped as the weight."""
    into, out = (part.reshape(-1, part.shape[-1]) for part in (x, dy))
    return into.t() @ out if stores_transpose(target) else out.t() @ into


def keep_for_backward(tensor: Tensor) -> Callable[[], Tensor]:
    """Save a tensor through autograd, so that checkpointing and offloading apply to it; return a function to get it."""
    # Keep the output alive: older versions of torch free a node's saved tensors together with it.
    kept = _Kept.apply(tensor, torch.ones((), requires_grad=True))
    return lambda: kept.grad_fn.saved_tensors[0]


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()


@contextlib.contextmanager
def output_gradients(
    targets: Mapping[str, Target], observe: Callable[[str, Target, Tensor], Callable[[Tensor], None]]
) -> Generator[None]:
    """Observe the output gradients of the targets within this context; compute no weight gradient.

    Each call of a target calls `observe` with the target's name, the target and its input x. Backward then calls what
    `observe` returned with the gradient dy of the output.
    """

    def observe_with_graph(name: str, target: Target, x: Tensor) -> Callable[[Tensor], None] | None:
        # Reentrant checkpointing first runs forward without a graph.
        return observe(name, target, x) if torch.is_grad_enabled() else None

    # With all weights frozen, the lowest target's output requires no gradient.
    with watching_calls(targets, observe_with_graph, start=True):
        yield
