"""Find newly initialised parameters: the checkpoint lacks them, so they cannot be restored from the base.

These are new heads, a missing pooler and the rows of a resized vocabulary, all with random values. transformers marks
each parameter that it reads from a checkpoint (`_is_hf_initialized`), so in a model that it loaded, a parameter without
the mark is newly initialised. Embeddings keep the mark when they are resized, so their shapes are compared with those
in the checkpoint. A copy of a loaded model (`copy.deepcopy`) has no marks. Its names are looked up in the checkpoint,
unless loading converts names. A model built from a configuration alone has no checkpoint; nothing is reported for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from smt_trainer.model.base import base_checkpoint, base_config
from smt_trainer.model.checkpoint import Checkpoint, vocabulary_sizes
from smt_trainer.model.language_model import vocabulary_weights
from smt_trainer.model.names import find_names, plain_name
from smt_trainer.model.sharded import full_shape

# What transformers sets on a parameter that it read from a checkpoint.
MARK = "_is_hf_initialized"


def newly_initialised(model: nn.Module) -> list[str]:
    """Return the full names of the newly initialised parameters, in the model's order."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    is_marked = any(hasattr(parameter, MARK) for parameter in parameters.values())
    checkpoint = base_checkpoint(model)
    if not is_marked and checkpoint is None:
        return []
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    shapes = _stored_shapes(checkpoint, parameters)
    tables = {name: full_shape(parameters[name]) for name in vocabulary_weights(model) if name in parameters}
    resized = {name for name, shape in tables.items() if shapes.get(name, shape) != shape}
    # If the weights cannot be read, their configuration still tells how large the vocabulary was.
    if checkpoint is None and (sizes := vocabulary_sizes(base_config(model))):
        resized |= {name for name, shape in tables.items() if shape[0] not in sizes}
    if not is_marked and _converts_names(model):
        return [name for name in parameters if name in resized]
    return [
        name
        for name, parameter in parameters.items()
        if name in resized
        # A device map may drop marks, so look in the checkpoint, too.
        or not (hasattr(parameter, MARK) or name in shapes or any(re.search(pattern, name) for pattern in ignored))
    ]


def _converts_names(model: nn.Module) -> bool:
    """Return whether transformers stores tensors of this model under other names, or several in one."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return isinstance(model, PreTrainedModel) and bool(get_model_conversion_mapping(model, add_legacy=False))


def new_rows(model: nn.Module) -> dict[str, range]:
    """Return the vocabulary's rows that the checkpoint lacks: weight of the token embeddings, or of a head not tied to
    them -> row numbers. A weight that shrank is skipped."""
    resized = [name for name in newly_initialised(model) if name in vocabulary_weights(model)]
    found = {}
    for name, before in _stored_shapes(base_checkpoint(model), resized).items() if resized else ():
        after = full_shape(model.get_parameter(name))
        if len(after) == 2 and before[1:] == after[1:] and before[0] < after[0]:
            found[name] = range(before[0], after[0])
    return found


def _stored_shapes(checkpoint: Checkpoint | None, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters in a checkpoint, if it can be read; skip those that it lacks."""
    tensors = {} if checkpoint is None else checkpoint.tensors
    return {name: tensors[other].shape for name, other in find_names(names, tensors).items()}
