"""Write files and folders so that a crash never leaves half of one.

A file or folder NAME is first written under a hidden name next to it, `.NAME.XXXXXXXX.partial` for a file and
`.NAME.partial` for a folder, and locked until the process ends. So the next process that writes NAME recognises what a
killed process left, and removes it.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from safetensors import SafetensorError

from smt_trainer.errors import SMTError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file next to `path`, then move that file to `path` in one step.

    Raises:
        OSError: the file could not be written, for example to a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    with _temporary(path) as temporary:
        try:
            write(temporary)
            _flush_file(temporary)
            # mkstemp makes files private; give them the mode that open() would.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """Create a temporary file next to `path` and yield its path; it is locked within this context."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        if fcntl is None:
            os.close(descriptor)
            yield Path(name)
            return
        try:
            # Before it was locked, another process may have taken the file for a leftover and removed it.
            if _lock(descriptor) is not False and _is_at(descriptor, Path(name)):
                yield Path(name)
                return
        finally:
            os.close(descriptor)


def _remove_left(path: Path) -> None:
    """Remove the temporary files for `path` that killed processes left; those of running processes are locked."""
    if fcntl is None:
        return
    for file in path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}{PARTIAL}"):
        # It may belong to another user or not be a file, or another process may remove it first.
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(descriptor) and _is_at(descriptor, file):
                    file.unlink()
                    logger.warning("Removed %s, which a killed process left.", file)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock the open file or folder until its descriptor is closed. Return whether it was free; None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None  # a file system without locks
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still leads to the file or folder that a descriptor has open."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_new(output: Path) -> None:
    """Raise `SMTError` unless `output` is new or an empty folder, and neither a link nor the working folder."""
    if output.resolve() == Path.cwd():
        raise SMTError(f"{output} is the working folder, which cannot be replaced; give another one.")
    if output.is_symlink():
        raise SMTError(f"{output} is a link; give the folder itself, which must be new or empty.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SMTError(f"{output} exists and is not empty; give a new folder or empty it first.")


@contextlib.contextmanager
def new_folder(output: Path) -> Generator[Path]:
    """Yield a hidden folder next to `output`, which becomes `output` if the context ends without an exception.

    A folder that a killed process left is emptied and used again.

    Raises:
        SMTError: `output` is a link, or exists and is not an empty folder; or another process is writing it.
        OSError: a file in the folder could not be written, for example to a full disk.
    """
    check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.parent / f".{output.name}{PARTIAL}"
    with _locked(stage, output):
        try:
            _empty(stage)
            yield stage
            _set_modes(stage)
            _flush(stage)
            stage.replace(output)
        except (SafetensorError, OSError) as error:
            if getattr(error, "filename", None) is not None:
                raise
            raise OSError(f"{output} could not be written: {error}") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _locked(stage: Path, output: Path) -> Generator[None]:
    """Create a folder if needed, and lock it within this context; the lock ends with the process at the latest."""
    if stage.is_symlink():
        raise SMTError(f"{stage} is a link; remove it.")
    stage.mkdir(exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        # The other process may have finished in between: its folder is `output` now.
        if _lock(descriptor) is False or not _is_at(descriptor, stage):
            raise SMTError(f"another process is writing {output}; wait for it, or give another folder.")
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    left = list(folder.iterdir())
    if left:
        logger.warning("Removing what a killed process left in %s.", folder)
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_file(path)


def _flush_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _set_modes(folder: Path) -> None:
    """Give files and folders the modes that open() and mkdir() would; some writers make them private."""
    umask = _umask()
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
