"""The manifest of a delta, a selection or scores: format, configuration, grids, base. One reader for all three.

A delta and scores keep theirs as JSON in the metadata of their safetensors file; a selection is a manifest alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.files import open_tensors

# What reading damaged data can raise, besides SMTError.
DAMAGE = (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError)


def load_tensors(path: Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest and the tensors of a safetensors file.

    Args:
        path: the file.
        key: where its metadata holds the manifest.
        what: what the file should be, for messages.

    Raises:
        SMTError: the file is missing or damaged, or it has no such manifest.
    """
    with open_tensors(path, what) as file:
        text = (file.metadata() or {}).get(key)
        if text is None:
            raise SMTError(f"{path} is not a {what} of smt_trainer: it has no manifest. Check the path.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    with refusing_damage(f"{what} at {path}"):
        return json.loads(text), tensors


@contextlib.contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """Raise `SMTError` for whatever the content of a damaged file raises in this context."""
    try:
        yield
    except SMTError:
        raise
    except DAMAGE as error:
        raise SMTError(
            f"the {what} is damaged ({type(error).__name__}: {error}); save or download it again."
        ) from error


def check_format(values: Mapping[str, Any], expected: Any, what: str) -> None:
    """Raise `SMTError` if a manifest has another format than this version reads."""
    if values["format"] != expected:
        raise SMTError(
            f"the {what} has format {values['format']}, this version of smt_trainer reads {expected}; install the "
            "version that wrote it."
        )
