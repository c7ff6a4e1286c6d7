"""Find the head that transformers puts on a model for a task, and that fine-tuning usually begins with random values.

It is all that holds a matrix beside the base: `score`, `classifier`, which may be a sequence, or a pooler and it. A few
models have no base as one child (CLIP's for images, HGNetV2's). Theirs is what has as many outputs as there are labels.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smt_trainer.model.kinds import named_layers, weight_shape
from smt_trainer.model.sharded import full_shape

# Parts of the names of the classes that have one: for sentences, tokens, images, videos, sounds and time series.
HEADED_CLASSES = ("Classification", "ForMultipleChoice", "ForQuestionAnswering")


def head_names(model: nn.Module) -> list[str]:
    """Name the children of a model that hold its new head, such as `score`; none but for the classes with one."""
    if not any(task in type(model).__name__ for task in HEADED_CLASSES):
        return []
    base: Any = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    has_base = children.pop(base, None) is not None
    return [name for name, child in children.items() if _has_matrix(child) and (has_base or _classifies(child, model))]


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module has more than a norm has."""
    return any(len(full_shape(parameter)) > 1 for parameter in module.parameters())


def _classifies(module: nn.Module, model: nn.Module) -> bool:
    """Return whether a module holds a layer with as many outputs as its model has labels."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return any(weight_shape(layer)[0] == labels for layer in named_layers(module).values())
