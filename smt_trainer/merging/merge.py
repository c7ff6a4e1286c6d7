"""Merge a delta into a checkpoint on disk: copy its files, then overwrite the bytes that training changed.

Memory holds the delta and no weights of the base. Copying starts first; meanwhile the rest is imported and checked.
torch is imported only if `onto` is given, or transformers renames, splits or combines the tensors on loading.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from smt_trainer.delta.hub import find_delta
from smt_trainer.errors import SMTError
from smt_trainer.files import check_new, new_folder
from smt_trainer.merging.side_files import copy_others
from smt_trainer.model.checkpoint import Checkpoint, find_checkpoint

logger = logging.getLogger(__name__)

CHUNK = 2**28


def merge_checkpoint(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    onto: str | None = None,
) -> Path:
    """Write base plus delta as a plain checkpoint, with the sharding, metadata and dtype of the base.

    The other files are the base's, except that tokenizer, chat templates and generation settings are taken from the
    delta's folder if it has them (see `merging/side_files.py`).

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        delta: folder or hub name of the delta.
        output: folder to make; it appears whole or not at all.
        base_revision: revision of a base on the hub.
        delta_revision: revision of a delta on the hub.
        onto: for a delta of a quantised base, "original" or "dequantized" (see `delta/onto.py`). With either,
            the trained model and the result are loaded, to log how far apart they are.

    Returns:
        The output folder.

    Raises:
        SMTError: the output exists and is not empty, is a link, lies in the base or is being written by another
            process; the delta is damaged or belongs to another base; the base is not a safetensors checkpoint; or
            `onto` is missing or does not apply. Nothing is written.
    """
    output = Path(output)
    checkpoint, delta_folder = open_both(base, delta, output, base_revision, delta_revision)
    with new_folder(output) as stage:
        if onto is None:
            _patch(checkpoint, delta_folder, stage, onto)
        else:
            _merge_quantised(checkpoint, delta_folder, stage, onto)
    return output


def open_both(
    base: str | Path, delta: str | Path, output: Path, base_revision: str | None, delta_revision: str | None
) -> tuple[Checkpoint, Path]:
    """Find a base and the folder of a delta, on disk or on the hub, and check that the output can be written.

    Raises:
        SMTError: there is no delta, the output exists and is not empty, is a link or lies in one of them, or the base
            is not a safetensors checkpoint.
    """
    check_new(output)
    delta_folder = find_delta(delta, delta_revision)
    folder = find_checkpoint(base, base_revision)
    check_outside(output, folder, delta_folder)
    return Checkpoint.open(folder), delta_folder


def check_outside(output: Path, *folders: Path) -> None:
    """Raise `SMTError` if the output folder is, or lies in, one of those that are read."""
    for taken in folders:
        if taken.resolve() in (output.resolve(), *output.resolve().parents):
            raise SMTError(f"{output} lies in {taken}; give a folder outside of all folders that are read.")


def _merge_quantised(checkpoint: Checkpoint, delta_folder: Path, stage: Path, onto: str) -> None:
    from smt_trainer.delta.delta import Delta
    from smt_trainer.delta.onto import DEQUANTIZED, check_onto

    delta = Delta.load(delta_folder)
    check_onto(delta, onto, is_quantised=checkpoint.is_quantised)

    from smt_trainer.merging.dequantise import load_trained, log_difference, write_dequantised

    trained = load_trained(checkpoint, delta_folder, delta.quantization)
    if onto == DEQUANTIZED:
        write_dequantised(trained, checkpoint, delta_folder, stage)
    else:
        _patch(checkpoint, delta_folder, stage, onto)
    log_difference(trained, stage)


def _patch(checkpoint: Checkpoint, delta_folder: Path, stage: Path, onto: str | None) -> None:
    """Copy the weights, write the trained values into each copy once it is complete, and copy the other files."""
    with copying(checkpoint, stage) as copies:
        from smt_trainer.merging.plan import MergePlan

        plan = MergePlan.load(delta_folder, checkpoint, onto)
        for number, (name, copy) in enumerate(copies.items(), 1):
            copy.result()
            plan.write(stage / name)
            logger.info("%s is merged (%d of %d).", name, number, len(copies))
        copy_others(checkpoint, delta_folder, stage, resized=plan.is_resized)


@contextlib.contextmanager
def copying(checkpoint: Checkpoint, stage: Path) -> Generator[dict[str, Future]]:
    """Copy the weights in the background, two files at a time; stop if the context ends in an exception."""
    cancelled = threading.Event()
    with ThreadPoolExecutor(2, thread_name_prefix="copy") as pool:
        try:
            yield {
                name: pool.submit(_copy, checkpoint.folder / name, stage / name, cancelled) for name in checkpoint.files
            }
        finally:
            cancelled.set()
            pool.shutdown(cancel_futures=True)


def _copy(source: Path, destination: Path, cancelled: threading.Event) -> None:
    with open(source, "rb") as reader, open(destination, "xb") as writer:
        try:
            # Copies in the kernel, where the file system may share the data.
            while not cancelled.is_set() and os.copy_file_range(reader.fileno(), writer.fileno(), CHUNK):
                pass
        except (AttributeError, OSError):
            shutil.copyfileobj(reader, writer)
