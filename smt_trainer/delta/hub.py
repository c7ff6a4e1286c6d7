"""Deltas on the Hugging Face hub: one repository per delta, one commit per state. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE, OF_TRAINING, files_of_training
from smt_trainer.errors import SMTError
from smt_trainer.model.checkpoint import CONFIG_FILE
from smt_trainer.model.hub import fetch, is_folder

README = "README.md"
# A run's folder also holds scores, selection and pickled arguments, which loading the delta does not need.
OF_DELTA = [DELTA_FILE, CONFIG_FILE, *OF_TRAINING]


def find_delta(delta: str | Path, revision: str | None = None, **access: Any) -> Path:
    """Return the folder of a delta: itself, or its download from the hub.

    Args:
        delta: a folder, or a name on the hub.
        revision: branch, tag or commit of a delta on the hub.
        access: `token`, `cache_dir` and `local_files_only` of huggingface_hub.

    Raises:
        SMTError: there is no such folder or repository, it holds no delta, or it cannot be fetched.
    """
    folder = Path(delta) if is_folder(delta, revision) else fetch("delta", delta, revision, OF_DELTA, **access)
    if not (folder / DELTA_FILE).is_file():
        raise SMTError(f"no delta at {delta}: {DELTA_FILE} is missing. Check the path or name.")
    return folder


def push_delta(
    folder: str | Path,
    name: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload delta",
) -> str:
    """Upload a delta to the hub in one commit: its folder, without files that a run left there, and a model card.

    `SMTTrainer.push_to_hub` does this for a model in training, with figures of the run in the card.

    Args:
        folder: a delta folder; its README.md is the card, if it has one.
        name: name of the repository, such as "user/delta"; it is created if needed.
        revision: branch to commit to, created if needed; by default main.
        private: whether a new repository is private; by default the account's setting.
        token: token of an account with write access; by default the logged-in one.
        message: commit message.

    Returns:
        The commit, which `from_delta(name, revision=...)` takes.

    Raises:
        SMTError: the delta is damaged, or the hub refuses it or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from smt_trainer.delta.delta import Delta
    from smt_trainer.delta.model_card import new_card

    folder = find_delta(folder)
    delta, api = Delta.load(folder), HfApi(library_name="smt_trainer", token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        operations = [
            CommitOperationAdd(str(path), folder / path)
            for path in (DELTA_FILE, MANIFEST_FILE, CONFIG_FILE, README, *files_of_training(folder))
            if (folder / path).is_file()
        ]
        if not (folder / README).is_file():
            operations.append(CommitOperationAdd(README, new_card(delta, folder, name).encode()))
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        return api.create_commit(name, operations, commit_message=message, revision=revision).oid
    except Exception as error:
        raise SMTError(
            f"the delta could not be pushed to {name} on the hub ({error}). Check the connection, log in with an "
            "account that may write there (hf auth login), and push again."
        ) from error
