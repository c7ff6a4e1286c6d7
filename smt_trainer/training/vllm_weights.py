"""Make TRL's trainers send the parameters of the merged model to vLLM (`use_vllm=True`).

TRL sends all of `model.named_parameters()` before it generates, in one of two places:

    `trainer.vllm_generation.sync_weights`    GRPO, RLOO, distillation and others
    `trainer._move_model_to_vllm`             online DPO

A rewritten model has each parameter of the merged one, under the same name and in the same order, and its `blocks`. So
while TRL sends, the model leaves out the blocks (`as_merged`). Gathering, order and transport stay TRL's.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from smt_trainer.sparse.block_module import block_modules

if TYPE_CHECKING:
    from torch.nn import Parameter


@contextlib.contextmanager
def as_merged(model: nn.Module) -> Generator[None]:
    """Make `model.named_parameters()` yield the parameters of the merged model, with its values, in this context."""
    blocks = set()
    for _, linear in block_modules(model):
        linear.write_if_changed()
        blocks.add(id(linear.blocks))

    def named_parameters(*args, **kwargs) -> Iterator[tuple[str, Parameter]]:
        named = type(model).named_parameters(model, *args, **kwargs)
        return ((name, parameter) for name, parameter in named if id(parameter) not in blocks)

    vars(model)["named_parameters"] = named_parameters
    try:
        yield
    finally:
        del vars(model)["named_parameters"]


class SyncsVLLM:
    """The part of `SMTTrainerMixin` that sends weights to vLLM."""

    model: Any
    vllm_generation: Any

    def sync_vllm(self, sync_all: Callable[[], None]) -> None:
        """Update the weights of vLLM. TRL's trainers call this before they generate, if a step was taken since.

        By default this sends the whole merged model, as TRL does. Override it to send only what training changes:
        `sync_all()` the first time, and then `model_patches(self.model)`, converted for vLLM by `to_vllm` or
        `to_sparse_nccl`. With `vllm_enable_sleep_mode=True` vLLM forgets its weights, so send all each time. After
        patches, reset vLLM's prefix cache.

        Args:
            sync_all: sends all parameters of the merged model, with their names. In the warm-up
                (`self.is_in_warmup`), the model is still the base.
        """
        sync_all()

    def _move_model_to_vllm(self) -> None:
        send = super()._move_model_to_vllm  # pyrefly: ignore[missing-attribute]  # only online DPO calls this
        self._sync(self.model, send)

    def _sync(self, model: nn.Module, send: Callable[[], None]) -> None:
        def sync_all() -> None:
            with as_merged(model):
                send()

        self.sync_vllm(sync_all)

    def _follow_vllm(self) -> None:
        """Replace the `sync_weights` of TRL's `vllm_generation`, which also calls it itself."""
        generation = getattr(self, "vllm_generation", None)
        if generation is not None:
            # Weak proxies: a reference cycle would keep the model alive until the next garbage collection.
            trainer, sender = weakref.proxy(self), weakref.proxy(generation)
            send = type(generation).sync_weights
            generation.sync_weights = lambda: trainer._sync(sender.model, lambda: send(sender))


def knows_sync(trainer: Any) -> bool:
    """Return whether a trainer sends weights to vLLM in one of the two places."""
    known = getattr(trainer, "vllm_generation", None)
    behind = super(SyncsVLLM, trainer) if isinstance(trainer, SyncsVLLM) else trainer
    return callable(getattr(known, "sync_weights", None)) or hasattr(behind, "_move_model_to_vllm")
