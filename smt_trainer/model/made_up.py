"""Find the parameters that no base gives back: loading made them up, because the checkpoint does not have them.

New heads, a missing pooler, the rows of a resized vocabulary: their values are random. transformers marks each
parameter that it reads from a checkpoint (`_is_hf_initialized`), so in a model that it loaded a parameter without the
mark is made up. Embeddings keep the mark when they are resized; they are compared with the shapes in the checkpoint. A
model that was built from a configuration has no marks, and there is nothing to tell.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.checkpoint import CONFIG, Checkpoint
from smt_trainer.model.names import find_names, plain_name
from smt_trainer.model.sharded import full_shape

# What transformers sets on a parameter that it read from a checkpoint.
MARK = "_is_hf_initialized"


def made_up(model: nn.Module) -> list[str]:
    """Return the full names of the parameters that loading made up, in the model's order."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    if not any(hasattr(parameter, MARK) for parameter in parameters.values()):
        return []
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    checkpoint = _checkpoint(model)
    stored = find_names(parameters, {} if checkpoint is None else checkpoint.places)
    resized = {
        name
        for name in embeddings(model)
        if checkpoint is not None
        and name in stored
        and checkpoint.places[stored[name]].shape != full_shape(parameters[name])
    }
    return [
        name
        for name, parameter in parameters.items()
        if name in resized
        # A device map may drop marks, but not what the checkpoint holds.
        or not (hasattr(parameter, MARK) or name in stored or any(re.search(pattern, name) for pattern in ignored))
    ]


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
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, CONFIG, revision=getattr(config, "_commit_hash", None))
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return Checkpoint.open(folder)
    except SMTError:
        return None
