"""Find the parameters that no base gives back: loading made them up, because the checkpoint does not have them.

New heads, a missing pooler, the rows of a resized vocabulary: their values are random. transformers marks each
parameter that it reads from a checkpoint (`_is_hf_initialized`), so in a model that it loaded a parameter without the
mark is made up. Embeddings keep the mark when they are resized; they are compared with the shapes in the checkpoint. A
model that was built from a configuration has no marks, and there is nothing to tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.files import load_json, open_tensors
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import full_shape

MARK = "_is_hf_initialized"
CHECKPOINT, INDEX = "model.safetensors", "model.safetensors.index.json"


def made_up(model: nn.Module) -> list[str]:
    """Return the full names of the parameters that loading made up, in the model's order."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    if not any(hasattr(parameter, MARK) for parameter in parameters.values()):
        return []
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unmarked = {name for name, parameter in parameters.items() if not hasattr(parameter, MARK)}
    unmarked = {name for name in unmarked if not any(re.search(pattern, name) for pattern in ignored)}
    return [name for name in parameters if name in unmarked or name in _resized(model)]


def embeddings(model: nn.Module) -> list[str]:
    """Return the full names of the weights of a model's token embeddings and of the head that mirrors them."""
    found = [getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings")]
    owned = {id(module) for module in found if isinstance(module, nn.Module)}
    return [
        plain_name(f"{path}.{name}")
        for path, module in model.named_modules()
        if id(module) in owned
        for name, _ in module.named_parameters(recurse=False)
    ]


def _resized(model: nn.Module) -> set[str]:
    """Return the embeddings that have another shape than in the checkpoint, as far as that is at hand."""
    names = set(embeddings(model)) & {plain_name(name) for name, _ in model.named_parameters()}
    resized = set()
    for name in names:
        for key, shape in _stored_shapes(model, name):
            if (key == name or key.endswith(f".{name}") or name.endswith(f".{key}")) and shape != full_shape(
                model.get_parameter(name)
            ):
                resized.add(name)
    return resized


def _stored_shapes(model: nn.Module, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of the tensors in the model's checkpoint that are called like the last parts of a name."""
    leaf = ".".join(name.split(".")[-2:])
    for path in _checkpoint(model):
        try:
            with open_tensors(path, "base") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key.endswith(leaf):
                        yield key, tuple(file.get_slice(key).get_shape())
        except SMTError:
            return


def _checkpoint(model: nn.Module) -> list[Path]:
    """Return the files of the model's checkpoint in a folder or in the hub's cache; none if they are not at hand."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return []
    if Path(name).is_dir():
        single, index = Path(name, CHECKPOINT), Path(name, INDEX)
    else:
        from huggingface_hub import try_to_load_from_cache

        revision = getattr(config, "_commit_hash", None)
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in (CHECKPOINT, INDEX)]
        single, index = (Path(path) if isinstance(path, str) else Path() for path in cached)
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        shards = set(load_json(index, "index of the base")["weight_map"].values())
    except (SMTError, KeyError, TypeError, AttributeError):
        return []
    return [index.parent / Path(shard).name for shard in sorted(shards)]
