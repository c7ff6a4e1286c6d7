"""Read JSON so that a damaged file raises nothing but `SMTError`. Files of our own are read with `parse_json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smt_trainer.errors import SMTError

# What the content of a damaged file can raise, besides SMTError.
DAMAGE = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(RuntimeError, MemoryError, SafetensorError),
)


def load_json(path: Path, what: str, parse: Callable[[bytes], Any] = json.loads) -> Any:
    """Parse a JSON file. Raise `SMTError` if it is missing or damaged; the message says `what` was expected.

    By default NaN and Infinity are read: configurations and logs of transformers hold them.
    """
    if not path.is_file():
        raise SMTError(f"no {what} at {path}: expected a JSON file. Check the path.")
    try:
        return parse(path.read_bytes())
    except DAMAGE as error:
        raise SMTError(f"the {what} at {path} is not valid JSON ({error}). It is damaged; create it again.") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON strictly: raise one of `DAMAGE` also for NaN, Infinity and a key given twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repetition)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values
