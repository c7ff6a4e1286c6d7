"""Choose the files of a merged checkpoint other than its weights. Imports no torch.

the base's        all files and folders except weights, hidden ones, and what a trainer or this library leaves behind
the delta's       tokenizer, chat templates, processor and generation settings of training, in place of the base's
config.json       the delta's, with what describes the weights and the code taken from the base's
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePath
from typing import Any

from smt_trainer.delta.folder import (
    AS_STORED,
    CODE_KEY,
    LAYERS,
    NO_WEIGHTS,
    OF_TRAINING,
    TOKENIZER_STATE,
    VOCABULARY,
    files_beside_weights,
    files_of_training,
    fits,
    load_config,
)
from smt_trainer.errors import SMTError
from smt_trainer.json_files import load_json
from smt_trainer.model.checkpoint import CONFIG_FILE, WEIGHTS_KEY, Checkpoint

# Keys of config.json that the base decides: its tensors have these sizes.
OF_WEIGHTS = [
    *AS_STORED,
    *(LAYERS, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
]


def copy_others(checkpoint: Checkpoint, delta_folder: Path, stage: Path, *, resized: bool = False) -> None:
    """Write all files of a merged checkpoint other than its weights into `stage`: `other_files` and the shard index.

    Raises:
        SMTError: as `other_files`.
    """
    files = other_files(checkpoint, delta_folder, resized=resized)
    if checkpoint.index is not None:
        files[PurePath(checkpoint.index)] = checkpoint.folder / checkpoint.index
    _write(files, stage)


def other_files(checkpoint: Checkpoint, delta_folder: Path, *, resized: bool = False) -> dict[PurePath, Path | str]:
    """Return the files of a merged checkpoint other than its weights: name -> the file to copy, or the text to write.

    Args:
        checkpoint: the base.
        delta_folder: holds the files of training.
        resized: whether the delta has another vocabulary than the base.

    Raises:
        SMTError: a JSON file in the delta's folder is damaged.
    """
    files: dict[PurePath, Path | str] = {
        name: checkpoint.folder / name for name in files_beside_weights(checkpoint.folder, delta_folder)
    }
    trained = _files_of_training(checkpoint, delta_folder)
    if PurePath("tokenizer_config.json") in trained:
        # A saved tokenizer is complete; files of the base's tokenizer next to it could override it.
        files = {name: path for name, path in files.items() if not fits(name, TOKENIZER_STATE)}
    files |= trained
    path = delta_folder / CONFIG_FILE
    if path.is_file():
        found = load_json(path, "configuration of the delta's model")
        if not isinstance(found, dict):
            raise SMTError(f"{path} should hold an object. Save the delta again, or remove that file.")
        found.pop(WEIGHTS_KEY, None)
        merged = found if checkpoint.config is None else merge_configs(checkpoint.config, found, resized)
        files[PurePath(CONFIG_FILE)] = json.dumps(merged, indent=2, sort_keys=True) + "\n"
    return files


def copy_trained(checkpoint: Checkpoint, delta_folder: Path, stage: Path) -> None:
    """Copy the tokenizer, chat templates, processor and generation settings of training, where present, into `stage`;
    their `auto_map` is the base's."""
    _write(_files_of_training(checkpoint, delta_folder), stage)


def copy_to_delta(source: Path, stage: Path) -> None:
    """Copy a model's tokenizer, chat templates, processor, generation settings and configuration next to a new delta.

    Args:
        source: folder of the tuned model, or of its delta.
        stage: folder of the new delta.
    """
    names = [name for name in files_beside_weights(source) if fits(name, OF_TRAINING)]
    files: dict[PurePath, Path | str] = {name: source / name for name in names}
    if config := load_config(source):
        files[PurePath(CONFIG_FILE)] = json.dumps(config | {WEIGHTS_KEY: NO_WEIGHTS}, indent=2, sort_keys=True) + "\n"
    _write(files, stage)


def copy_of_base(checkpoint: Checkpoint, stage: Path) -> None:
    """Copy the files of a base other than its weights and their index."""
    _write({name: checkpoint.folder / name for name in files_beside_weights(checkpoint.folder)}, stage)


def merge_configs(base: dict[str, Any], trained: dict[str, Any], resized: bool) -> dict[str, Any]:
    """Return the configuration of training with the base's `OF_WEIGHTS`, also in nested configurations."""
    of_weights = [key for key in OF_WEIGHTS if not (resized and key == VOCABULARY)]
    merged = {key: value for key, value in trained.items() if key not in of_weights}
    merged |= {key: base[key] for key in of_weights if key in base}
    parts = [key for key, value in merged.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return merged | {key: merge_configs(base[key], merged[key], resized) for key in parts if key not in of_weights}


def _files_of_training(checkpoint: Checkpoint, delta_folder: Path) -> dict[PurePath, Path | str]:
    return {
        name: _with_code_of_base(delta_folder / name, checkpoint.folder / name)
        if name.suffix == ".json"
        else delta_folder / name
        for name in files_of_training(delta_folder)
    }


def _write(files: dict[PurePath, Path | str], stage: Path) -> None:
    for name, content in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (stage / name).write_text(content, encoding="utf-8")
        else:
            shutil.copyfile(content, stage / name)


def _with_code_of_base(path: Path, of_base: Path) -> Path | str:
    """Return a file of training, or, if it has an `auto_map`, its text with that of the base's file or with none: a
    delta's author must not choose the code that runs."""
    values = load_json(path, "file of training")
    if not isinstance(values, dict) or CODE_KEY not in values:
        return path
    known = load_json(of_base, "file of the base") if of_base.is_file() else {}
    del values[CODE_KEY]
    values |= {CODE_KEY: known[CODE_KEY]} if isinstance(known, dict) and CODE_KEY in known else {}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
