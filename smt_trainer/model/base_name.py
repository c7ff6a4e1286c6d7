"""Find the name of the base that a model was loaded from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from smt_trainer.model.hub import cached_commit
from smt_trainer.model.merged import is_merged


def base_name(model: nn.Module) -> str | None:
    """Return the model's hub name, with its revision if known (`name@commit`); for a local base, the folder's name.

    A model that a delta was merged into has no name: it is no longer the base that it was loaded from.
    """
    if is_merged(model):
        return None
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    if Path(name).exists():
        return Path(name).resolve().name
    revision = getattr(config, "_commit_hash", None) or cached_commit(name)
    return f"{name}@{revision}" if revision else name
