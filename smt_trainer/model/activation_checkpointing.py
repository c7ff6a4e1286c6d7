"""Activation checkpointing, without the gradient of the embeddings that only its reentrant kind needs.

Without that gradient, backward stops at the lowest layer with blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing as SMTTrainer does: without a gradient for the embeddings."""
    # Early 5.x versions of transformers only have the second name; later ones warn that it is deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def let_backward_stop_early(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Undo Trainer's request for the gradient of the embeddings, unless the reentrant kind is used."""
    # pyrefly: ignore[no-matching-overload]  # TrainingArguments has parsed a string
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    for handled_by_transformers in ("every_n_layers", "offload"):
        kwargs.pop(handled_by_transformers, None)
    # Without kwargs, transformers uses the other kind; with kwargs that lack `use_reentrant`, torch the reentrant one.
    reentrant = bool(kwargs) and kwargs.get("use_reentrant") is not False
    if args.gradient_checkpointing and not reentrant and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
