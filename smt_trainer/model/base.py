"""Find the base that a model was loaded from: its name, its checkpoint and its configuration there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.json_files import load_json
from smt_trainer.model.checkpoint import CONFIG_FILE, Checkpoint
from smt_trainer.model.hub import at_commit, cached_commit, cached_folder
from smt_trainer.model.merged import is_merged


def base_name(model: nn.Module) -> str | None:
    """Return the model's hub name, with its revision if known (`name@commit`); for a local base, the folder's name.

    A model that a delta was merged into has no name: it is no longer the base that it was loaded from.
    """
    if is_merged(model):
        return None
    name, commit = _loaded_from(model)
    if not name:
        return None
    if Path(name).exists():
        return Path(name).resolve().name
    return at_commit(name, commit or cached_commit(name))


def base_checkpoint(model: nn.Module) -> Checkpoint | None:
    """Return the checkpoint that a model was loaded from, in a folder or the hub's cache; None if it cannot be read."""
    folder = _base_folder(model)
    try:
        return None if folder is None else Checkpoint.open(folder)
    except SMTError:
        return None


def base_config(model: nn.Module) -> dict[str, Any]:
    """Return the content of the config.json that a model was loaded with; an empty one if it cannot be read."""
    folder = _base_folder(model)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return {}
    config = load_json(folder / CONFIG_FILE, "configuration of the base")
    return config if isinstance(config, dict) else {}


def lost_base(model: nn.Module) -> str | None:
    """Return the name or path that a model was loaded by if it is found neither there nor in the hub's cache."""
    name, _ = _loaded_from(model)
    return name if name and _base_folder(model) is None else None


def _base_folder(model: nn.Module) -> Path | None:
    """Return the folder that a model was loaded from, which may be in the hub's cache; None if it is not found."""
    name, commit = _loaded_from(model)
    if not name:
        return None
    return Path(name) if Path(name).is_dir() else cached_folder(name, commit)


def _loaded_from(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the name or path that a model was loaded by, and the commit, if transformers has noted them."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
