"""Read and write the tensors of safetensors files as numpy arrays. Imports no torch.

Files are mapped into memory, so only what is used of them is read.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file

from smt_trainer.arrays import DTYPES, dtype_name
from smt_trainer.errors import SMTError
from smt_trainer.tensor_header import Place, read_header


def load_arrays(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a safetensors file; writing to the arrays changes no file.

    Raises:
        SMTError: as `read_header`, or a dtype is not supported.
    """
    places, metadata = read_header(path, what)
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _view(buffer, place, 0) for name, place in places.items()}, metadata


def read_runs(path: Path, place: Place, count: int, step: int, length: int) -> np.ndarray:
    """Return [count, length] values of a tensor in a file: every `step` values in row-major order, `length` of them.

    Raises:
        SMTError: the tensor's dtype is not supported.
    """
    dtype = _dtype(place)
    # Mapped memory would bring in 16 pages at every run.
    with open(path, "rb", buffering=0) as file:
        starts = range(place.start, place.start + count * step * dtype.itemsize, step * dtype.itemsize or 1)
        data = b"".join(os.pread(file.fileno(), length * dtype.itemsize, start) for start in starts)
    return np.frombuffer(data, dtype).reshape(count, length)


def open_array(path: Path, place: Place, *, writable: bool = True) -> np.ndarray:
    """Return a tensor of a file, which stays mapped as long as the array lives.

    Args:
        path: the file.
        place: of the tensor in it.
        writable: whether writing to the array changes the file; otherwise the array is read-only, and so may the file.

    Raises:
        SMTError: the tensor's dtype is not supported.
    """
    if not place.size:
        return np.empty(place.shape, _dtype(place))
    first_page = place.start - place.start % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    with open(path, "r+b" if writable else "rb") as file:
        buffer = mmap.mmap(file.fileno(), place.start + place.size - first_page, access=access, offset=first_page)
    return _view(buffer, place, first_page)


def map_bits(path: Path, place: Place) -> np.ndarray:
    """Return the bits [n] of a tensor in a file, for comparing: an unsigned integer for each value, whatever its dtype
    means; a byte if a value has no whole bytes. The file stays mapped as long as the array lives."""
    if not place.size:
        return np.empty(0, np.uint8)
    size, rest = divmod(place.size, math.prod(place.shape))
    unit = size if not rest and size in (1, 2, 4, 8) else 1
    return np.asarray(np.memmap(path, f"u{unit}", "r", place.start, (place.size // unit,)))


def _view(buffer: mmap.mmap, place: Place, first: int) -> np.ndarray:
    """Return the tensor at a place in a buffer that begins with byte `first` of the file."""
    return np.frombuffer(buffer, _dtype(place), math.prod(place.shape), place.start - first).reshape(place.shape)


def _dtype(place: Place) -> np.dtype:
    if place.dtype not in DTYPES:
        raise SMTError(f"{place.file} has a tensor of {place.dtype}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[place.dtype]


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
