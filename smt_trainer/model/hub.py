"""Folders by their path, or by their name on the Hugging Face hub. Imports huggingface_hub only to fetch one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smt_trainer.errors import SMTError


def is_folder(name: str | Path, revision: str | None) -> bool:
    """Return whether a base or delta lies in a folder. Raise `SMTError` if it does, and a revision is given."""
    found = Path(name).is_dir()
    if found and revision is not None:
        raise SMTError(
            f"{name} is a folder, which has no revision {revision!r}. Leave it out, or give a name on the hub."
        )
    return found


def cached_commit(name: str) -> str | None:
    """Return the commit of a repository whose weights the hub's cache holds: the newest fetched of the main branch, if
    no other commit in the cache has other weights. transformers 5.23 does not say what it has loaded a model from."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        return None
    commit = Path(cached).parent
    weights = {
        frozenset(path.resolve() for path in folder.glob("*.safetensors")) for folder in commit.parent.iterdir()
    } - {frozenset()}
    return commit.name if len(weights) < 2 else None


def fetch(what: str, name: str | Path, revision: str | None, patterns: Iterable[str], **access: Any) -> Path:
    """Return the folder in the hub's cache with those files of a repository that match one of the patterns.

    Args:
        what: the repository should hold, for messages.
        name: of the repository, such as "user/model".
        revision: branch, tag or commit; by default the newest commit of the main branch.
        patterns: of file names, such as "*.json".
        access: `token`, `cache_dir` and `local_files_only` of huggingface_hub.

    Raises:
        SMTError: there is no such repository or revision, it may not be read, or the hub cannot be reached and the
            cache lacks a file.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(what, name, revision):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[*patterns], **access))


@contextlib.contextmanager
def hub_errors(what: str, name: str | Path, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into an `SMTError` that says what to do."""
    from huggingface_hub import errors

    reasons = {
        errors.HFValidationError: "it is not a folder, and cannot be a name on the hub. Check the path.",
        errors.GatedRepoError: "its owner lets in whom they choose. Ask on its page, and log in (hf auth login).",
        errors.RepositoryNotFoundError: "it is not a folder, and the hub shows no repository of this name. Check the "
        "name; if it is private, log in (hf auth login).",
        errors.RevisionNotFoundError: f"it has no revision {revision!r}. Its page lists branches, tags and commits.",
        (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled): "it is not a folder, and could not be fetched: "
        "the hub cannot be reached, or HF_HUB_OFFLINE is set. Connect, or give the folder of a download.",
    }
    try:
        yield
    except Exception as error:
        reason = next((reason for kinds, reason in reasons.items() if isinstance(error, kinds)), error)
        raise SMTError(f"no {what} at {name}: {reason}") from error
