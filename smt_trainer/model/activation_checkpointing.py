"""Activation checkpointing of a model, under either of its names in transformers."""

from __future__ import annotations

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing as SMTTrainer does: without a gradient for the embeddings."""
    # Early 5.x versions of transformers have only the second name; later ones warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
