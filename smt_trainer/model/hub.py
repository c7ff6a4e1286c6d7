"""Find folders by their path or their name on the Hugging Face hub. Imports huggingface_hub only for the latter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smt_trainer.errors import SMTError


def is_folder(name: str | Path, revision: str | None) -> bool:
    """Return whether a base or delta is a local folder. Raise `SMTError` for a file, and for a revision of a folder."""
    found = Path(name).is_dir()
    if Path(name).is_file():
        raise SMTError(f"{name} is a file. Give the folder that it lies in.")
    if found and revision is not None:
        raise SMTError(
            f"{name} is a folder, which has no revision {revision!r}. Leave it out, or give a name on the hub."
        )
    return found


def at_commit(name: str, commit: str | None) -> str:
    """Return `name@commit`, or the name alone if no commit is known."""
    return f"{name}@{commit}" if commit else name


def split_commit(name: str | None) -> tuple[str, str | None]:
    """Return name and commit of what `at_commit` returned; the name is empty for None."""
    name, _, commit = (name or "").partition("@")
    return name, commit or None


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a repository's revision in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that is no longer there
        return None
    return Path(found).parent if isinstance(found, str) else None


def cached_commit(name: str) -> str | None:
    """Return the main branch's commit in the hub's cache; None if another cached commit has other weights.

    So a model must have been loaded from these weights. transformers 5.23 no longer records the commit itself.
    """
    folder = cached_folder(name)
    if folder is None:
        return None
    weights = {frozenset(path.resolve() for path in each.glob("*.safetensors")) for each in folder.parent.iterdir()}
    return folder.name if len(weights - {frozenset()}) < 2 else None


def fetch(what: str, name: str | Path, revision: str | None, patterns: Iterable[str], **access: Any) -> Path:
    """Download the files of a repository that match any of the patterns; return their folder in the hub's cache.

    Args:
        what: what the repository should hold, for messages.
        name: of the repository, such as "user/model".
        revision: branch, tag or commit; by default the newest commit of the main branch.
        patterns: of file names, such as "*.json".
        access: `token`, `cache_dir` and `local_files_only` of huggingface_hub.

    Raises:
        SMTError: there is no such repository or revision, it may not be read, or the hub cannot be reached and the
            cache lacks a file.
    """
    from huggingface_hub import errors, snapshot_download

    offline = (
        "it is not a folder, and could not be fetched: the hub cannot be reached, or HF_HUB_OFFLINE is set. "
        "Connect, or give the folder of a download."
    )
    reasons = {
        errors.HFValidationError: "it is not a folder, and cannot be a name on the hub. Check the path.",
        errors.GatedRepoError: "it is gated. Ask for access on its page, and log in (hf auth login).",
        errors.RepositoryNotFoundError: "it is not a folder, and the hub shows no repository of this name. Check the "
        "name; if it is private, log in (hf auth login).",
        errors.RevisionNotFoundError: f"it has no revision {revision!r}. Its page lists branches, tags and commits.",
        errors.LocalEntryNotFoundError: offline,
        errors.OfflineModeIsEnabled: offline,
    }
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[*patterns], **access))
    except Exception as error:
        reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), error)
        raise SMTError(f"no {what} at {name}: {reason}") from error
