"""Read the manifest of a delta, a selection or scores: format, configuration, grids, base.

Deltas and scores store it as JSON in the metadata of their safetensors file; a selection's file is just a manifest.

Its `checksum` is SHA-256 over the rest of the manifest and, name by name, over each tensor's dtype, shape and bytes. It
finds damage, not forgery: whoever changes a file on purpose can write a new checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smt_trainer.arrays import dtype_name, raw
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError, printable
from smt_trainer.json_files import DAMAGE, parse_json
from smt_trainer.tensor_file import load_arrays

CHECKSUM = "checksum"


def load_sealed(path: Path, key: str, expected: str, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Load the manifest and the tensors of a safetensors file; verify the checksum and remove it from the manifest.

    Args:
        path: the file.
        key: where its metadata holds the manifest.
        expected: the format that this version reads.
        what: what the file should be, for messages.

    Raises:
        SMTError: the file is missing or damaged, it has no such manifest or another format, or no matching checksum.
    """
    tensors, metadata = load_arrays(path, what)
    text = metadata.get(key)
    if text is None:
        raise SMTError(f"{path} is not a {what} of smt_trainer: it has no manifest. Check the path.")
    with refusing_damage(f"{what} at {path}"):
        manifest = parse_json(text)
        check_format(manifest, expected, f"{what} at {path}")
        if CHECKSUM not in manifest:
            raise SMTError(f"the {what} at {path} has no checksum of its values. Save it again with this version.")
        return unsealed(manifest, f"{what} at {path}", tensors), tensors


def sealed(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Return a manifest with a checksum of its content and of the tensors that it describes."""
    return {**manifest, CHECKSUM: _checksum(manifest, tensors or {})}


def unsealed(manifest: Mapping[str, Any], what: str, tensors: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Return a manifest without its checksum. Raise `SMTError` if the checksum is wrong; it may be missing."""
    values = dict(manifest)
    if CHECKSUM in values and values.pop(CHECKSUM) != _checksum(values, tensors or {}):
        raise SMTError(
            f"the {what} is damaged: its content does not have the checksum that was saved with it. Save or download "
            f"it again{'' if tensors else f'; or, if you changed it yourself, remove its {CHECKSUM!r}'}."
        )
    return values


def _checksum(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(manifest).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, f"torch.{dtype_name(tensor)}", list(tensor.shape)]).encode())
        digest.update(raw(tensor).data)
    return digest.hexdigest()


@contextlib.contextmanager
def refusing_damage(what: str) -> Generator[None]:
    """Turn any exception that a damaged file's content causes in this context into `SMTError`."""
    try:
        yield
    except SMTError:
        raise
    except DAMAGE as error:
        raise SMTError(
            f"the {what} is damaged ({type(error).__name__}: {error}); save or download it again."
        ) from error


def check_format(values: Mapping[str, Any], expected: Any, what: str) -> None:
    """Raise `SMTError` unless a manifest has the format that this version reads."""
    if values["format"] != expected:
        raise SMTError(
            f"the {what} has format {values['format']}, this version of smt_trainer reads {expected}; install the "
            "version that wrote it."
        )


def read_base(values: Mapping[str, Any]) -> str | None:
    """Return the name of the base in a manifest, made printable. Raise `SMTError` unless it is a string or null."""
    name = values["base_model"]
    if name is not None and not isinstance(name, str):
        raise SMTError(f"base_model must be a name or null, got {type(name).__name__}. The file is damaged.")
    return name and printable(name)


def read_config(values: Mapping[str, Any]) -> SMTConfig:
    """Return the configuration in a manifest. Raise `SMTError` if it is malformed or has a selection of its own."""
    config = SMTConfig.from_dict(values["config"])
    if config.selection is not None:
        raise SMTError("the configuration in a manifest must have no selection of its own. The file is damaged.")
    return config


def check_keys(values: Mapping[str, Any], expected: set[str], what: str) -> None:
    """Raise `SMTError` unless a manifest is an object with exactly these keys."""
    if not isinstance(values, Mapping) or set(values) != expected:
        found = sorted(set(values) ^ expected) if isinstance(values, Mapping) else type(values).__name__
        raise SMTError(f"the {what} is damaged: missing or unknown {found}. Save or download it again.")
