"""Find the head that transformers puts on a model for a task; fine-tuning usually starts with random values in it.

The head is every child with a matrix except the base model: `score`, or `classifier` (which may be an `nn.Sequential`),
or a pooler and a classifier. In a few models the base is not a single child (CLIP's for images, HGNetV2's). There the
head is every child with a layer that has as many outputs as the model has labels.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smt_trainer.model.kinds import named_linears_and_convolutions, weight_shape
from smt_trainer.model.sharded import full_shape

# Parts of the names of classes with a head: for sentences, tokens, images, videos, sounds, speech and time series.
HEADED_CLASSES = ("Classification", "ForMultipleChoice", "ForQuestionAnswering", "ForCTC")


def has_head(model: nn.Module) -> bool:
    """Return whether a model is of a class with a head for a task."""
    return any(task in type(model).__name__ for task in HEADED_CLASSES)


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the children that form a model's head, such as `score`; empty for classes without one."""
    if not has_head(model):
        return []
    base: Any = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    has_base = children.pop(base, None) is not None
    return [name for name, child in children.items() if _has_matrix(child) and (has_base or _classifies(child, model))]


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module has a parameter with more than one dimension, unlike a norm."""
    return any(len(full_shape(parameter)) > 1 for parameter in module.parameters())


def _classifies(module: nn.Module, model: nn.Module) -> bool:
    """Return whether a module holds a layer with as many outputs as its model has labels."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return any(weight_shape(layer)[0] == labels for layer in named_linears_and_convolutions(module).values())
