"""Find the parameters that no base gives back: loading made them up, because the checkpoint does not have them.

New heads, a missing pooler, the rows of a resized vocabulary: their values are random. transformers marks each
parameter that it reads from a checkpoint (`_is_hf_initialized`), so in a model that it loaded a parameter without the
mark is made up. Embeddings keep the mark when they are resized; they are compared with the shapes in the checkpoint. A
model that was built from a configuration has no marks, and there is nothing to tell.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.hub import cached_folder
from smt_trainer.model.names import find_names, plain_name
from smt_trainer.model.sharded import full_shape

# What transformers sets on a parameter that it read from a checkpoint.
MARK = "_is_hf_initialized"


def made_up(model: nn.Module) -> list[str]:
    """Return the full names of the parameters that loading made up, in the model's order."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    if not any(hasattr(parameter, MARK) for parameter in parameters.values()):
        return []
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    shapes = _stored_shapes(model, parameters)
    resized = {name for name in embeddings(model) if name in shapes and shapes[name] != full_shape(parameters[name])}
    return [
        name
        for name, parameter in parameters.items()
        if name in resized
        # A device map may drop marks, but not what the checkpoint holds.
        or not (hasattr(parameter, MARK) or name in shapes or any(re.search(pattern, name) for pattern in ignored))
    ]


def new_rows(model: nn.Module) -> dict[str, range]:
    """Return the rows that the vocabulary has more than the checkpoint: weight of token embeddings, or of a head that
    is not tied to them -> row numbers. One that shrank has none."""
    resized = [name for name in made_up(model) if name in embeddings(model)]
    found = {}
    for name, before in _stored_shapes(model, resized).items() if resized else ():
        after = full_shape(model.get_parameter(name))
        if len(after) == 2 and before[1:] == after[1:] and before[0] < after[0]:
            found[name] = range(before[0], after[0])
    return found


def _stored_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters in the checkpoint that a model was loaded from, as far as it has them."""
    checkpoint = _checkpoint(model)
    places = {} if checkpoint is None else checkpoint.places
    return {name: places[other].shape for name, other in find_names(names, places).items()}


def embeddings(model: nn.Module) -> list[str]:
    """Return the full names of the weights of a model's token embeddings and of the head that mirrors them."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        # A model of images may have none, and transformers then raises.
        with contextlib.suppress(NotImplementedError):
            found.append(getattr(model, get, lambda: None)())
    owned = {id(module) for module in found if isinstance(module, nn.Module)}
    return [
        plain_name(f"{path}.{name}")
        for path, module in model.named_modules()
        if id(module) in owned
        for name, _ in module.named_parameters(recurse=False)
    ]


def _checkpoint(model: nn.Module) -> Checkpoint | None:
    """Return the checkpoint that a model was loaded from, in a folder or the hub's cache; None if it is not at hand."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        cached = cached_folder(name, getattr(config, "_commit_hash", None))
        if cached is None:
            return None
        folder = cached
    try:
        return Checkpoint.open(folder)
    except SMTError:
        return None
