"""Activation checkpointing, without the gradient of the embeddings that Trainer asks for with it."""

from __future__ import annotations

from transformers import PreTrainedModel, TrainingArguments


def let_backward_stop_early(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Undo Trainer's request for the gradient of the embeddings when it checkpoints activations.

    Only the reentrant kind needs that gradient; without it backward stops at the lowest layer with blocks.
    """
    # pyrefly: ignore[no-matching-overload]  # TrainingArguments has parsed a string
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    for handled_by_transformers in ("every_n_layers", "offload"):
        kwargs.pop(handled_by_transformers, None)
    # Without kwargs, transformers uses the other kind; with kwargs that lack `use_reentrant`, torch the reentrant one.
    reentrant = bool(kwargs) and kwargs.get("use_reentrant") is not False
    if args.gradient_checkpointing and not reentrant and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
