"""Read and write the tensors of safetensors files as numpy arrays. Imports no torch.

Files are mapped into memory, so only the parts that are used are read.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file

from smt_trainer.arrays import DTYPES, dtype_name
from smt_trainer.errors import SMTError
from smt_trainer.tensor_header import StoredTensor, read_header


def load_arrays(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a safetensors file; writing to the arrays does not change it.

    Raises:
        SMTError: as `read_header`, or a dtype is not supported.
    """
    tensors, metadata = read_header(path, what)
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _view(buffer, stored, 0) for name, stored in tensors.items()}, metadata


def read_runs(folder: Path, parts: Sequence[StoredTensor], count: int, step: int, length: int) -> np.ndarray:
    """Read `count` runs of a tensor, as [count, length]: `length` values out of every `step`, row-major.

    Args:
        folder: of the files.
        parts: the tensor, or its parts of one dtype, one after another.

    Raises:
        SMTError: the tensor's dtype is not supported, or the file ends too early.
    """
    dtype = _dtype(parts[0])
    step, length = step * dtype.itemsize, length * dtype.itemsize
    ends = list(itertools.accumulate(part.size for part in parts))
    pieces, place = [], 0
    with contextlib.ExitStack() as stack:
        # A memory map would read 16 pages for every run.
        names = {part.file for part in parts}
        files = {name: stack.enter_context(open(folder / name, "rb", buffering=0)).fileno() for name in names}
        for start in range(0, count * step, step or 1):
            left = length
            while left:
                while ends[place] <= start:
                    place += 1
                part, from_end = parts[place], ends[place] - start
                pieces.append(os.pread(files[part.file], min(left, from_end), part.start + part.size - from_end))
                if not pieces[-1]:
                    raise SMTError(f"{folder / part.file} was cut while it was read. Download it again.")
                start, left = start + len(pieces[-1]), left - len(pieces[-1])
    return np.frombuffer(b"".join(pieces), dtype).reshape(count, length // dtype.itemsize)


def open_array(path: Path, stored: StoredTensor, *, writable: bool = True) -> np.ndarray:
    """Return a tensor of a file, which stays mapped as long as the array lives.

    Args:
        path: the file.
        stored: the tensor in it.
        writable: whether writing to the array changes the file; if not, the array is read-only, and the file may be.

    Raises:
        SMTError: the tensor's dtype is not supported.
    """
    if not stored.size:
        return np.empty(stored.shape, _dtype(stored))
    first_page = stored.start - stored.start % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    with open(path, "r+b" if writable else "rb") as file:
        buffer = mmap.mmap(file.fileno(), stored.start + stored.size - first_page, access=access, offset=first_page)
    return _view(buffer, stored, first_page)


def map_bits(path: Path, stored: StoredTensor) -> np.ndarray:
    """Return the bits [n] of a tensor in a file, for comparison: an unsigned integer for each value whatever its dtype,
    or bytes if values are not 1, 2, 4 or 8 bytes long. The file stays mapped as long as the array lives."""
    if not stored.size:
        return np.empty(0, np.uint8)
    size, rest = divmod(stored.size, math.prod(stored.shape))
    unit = size if not rest and size in (1, 2, 4, 8) else 1
    return np.asarray(np.memmap(path, f"u{unit}", "r", stored.start, (stored.size // unit,)))


def _view(buffer: mmap.mmap, stored: StoredTensor, first: int) -> np.ndarray:
    """Return a stored tensor from a buffer that begins with byte `first` of the file."""
    return np.frombuffer(buffer, _dtype(stored), math.prod(stored.shape), stored.start - first).reshape(stored.shape)


def _dtype(stored: StoredTensor) -> np.dtype:
    if stored.dtype not in DTYPES:
        raise SMTError(f"{stored.file} has a tensor of {stored.dtype}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[stored.dtype]


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file."""
    kept = {name: np.ascontiguousarray(values).reshape(values.shape) for name, values in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=dtype_name(values), shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, values in kept.items()
    }
    serialize_file(specs, path, metadata=dict(metadata) or None)
