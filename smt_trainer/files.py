"""Read and write files so that a crash never leaves half a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smt_trainer.errors import SMTError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move that file to `path` in one step.

    Raises:
        OSError: the file could not be written, for example to a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; give them the mode that open() would.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `output` if the context ends without an exception.

    Raises:
        SMTError: `output` exists and is not an empty folder.
        OSError: a file in the folder could not be written, for example to a full disk.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SMTError(f"{output} exists and is not empty; give a new folder or empty it first.")
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        stage.replace(output)
    except SafetensorError as error:
        raise OSError(f"{output} could not be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def open_tensors(path: Path, what: str) -> Iterator[safe_open]:
    """Open a safetensors file. Raises `SMTError`, naming `what` was expected, if it is missing or damaged."""
    if not path.is_file():
        raise SMTError(f"no {what} at {path.parent}: {path.name} is missing. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SMTError(f"{path} is damaged or truncated ({error}); save or download the {what} again.") from error


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def load_json(path: Path, what: str) -> Any:
    """Parse a JSON file. Raises `SMTError`, naming `what` was expected, if it is missing or damaged."""
    if not path.is_file():
        raise SMTError(f"no {what} at {path}: expected a JSON file. Check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SMTError(f"the {what} at {path} is not valid JSON ({error}). It is damaged; create it again.") from error
