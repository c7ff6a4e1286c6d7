"""Turn on activation checkpointing, which has two names in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing as SMTTrainer does: without a gradient for the embeddings."""
    # Early 5.x versions of transformers only have the second name; later ones warn that it is deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
