"""Read the header of a safetensors file: which tensors it has, and where they lie. Imports neither torch nor numpy.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON), and the tensors' bytes. The
header gives each tensor's dtype, shape and `data_offsets`, which count from the header's end, and in `__metadata__`
arbitrary strings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smt_trainer.errors import SMTError
from smt_trainer.json_files import DAMAGE, parse_json
from smt_trainer.settings import is_int

LONGEST_HEADER = 100_000_000  # the limit of safetensors
# safetensors' name of a dtype -> torch's, and the bytes of a value.
DTYPES = {
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)},
    **{"F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1)},
    **{"F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1)},
    **{"I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "BOOL": ("bool", 1)},
    **{"U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "C64": ("complex64", 8)},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: name of the file in its folder.
        dtype: torch's name, such as "bfloat16"; safetensors' own if it is none of `DTYPES`.
        shape: of the tensor.
        start: its first byte in the file.
        size: its bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def rows(self, first: int, count: int) -> StoredTensor:
        """Return `count` rows of this tensor from `first` on, which are neighbours in the file, as a tensor."""
        size = self.size // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * size, size=count * size)


def read_header(path: Path, what: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return tensor name -> where it lies, and the metadata, of a safetensors file.

    Args:
        path: the file.
        what: what the file should be, for messages.

    Raises:
        SMTError: the file is missing or damaged, or its tensors do not fill it one after the other.
    """
    if not path.is_file():
        why = f"{path.name} is missing" if path.parent.is_dir() else "there is no such folder"
        raise SMTError(f"no {what} at {path.parent}: {why}. Check the path.")
    try:
        with open(path, "rb") as file:
            length, total = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > min(LONGEST_HEADER, total - 8):
                raise ValueError("its header is longer than the file, or than safetensors allows")
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not strings")
        tensors = {name: _stored_tensor(path.name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.size)):
            if stored.start != end:
                raise ValueError("its tensors overlap or leave gaps")
            end += stored.size
        if end != total:
            raise ValueError(f"it has {total:,} bytes, its header describes {end:,}")
    except (OSError, *DAMAGE) as error:
        raise SMTError(f"{path} is damaged or truncated ({error}); save or download the {what} again.") from error
    return tensors, metadata


def _stored_tensor(file: str, entry: dict[str, Any], offset: int) -> StoredTensor:
    (start, end), shape, code = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not all(is_int(number) and number >= 0 for number in [start, end - start, *shape]) or not isinstance(code, str):
        raise ValueError("a tensor has an invalid dtype, shape or place")
    dtype, size = DTYPES.get(code, (code, None))
    if size is not None and math.prod(shape) * size != end - start:
        raise ValueError(f"{end - start:,} bytes cannot hold a {code} tensor of shape {shape}")
    return StoredTensor(file, dtype, tuple(shape), offset + start, end - start)
