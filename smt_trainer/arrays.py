"""Handle tensors as numpy arrays, so that files are checked and merged without torch.

numpy has no bfloat16 and no float8. Arrays of these hold the bits, in a structured dtype with one field named after the
type: numpy can move such values but not calculate with them. Dtypes have torch's names.

    bfloat16 to float32   its 16 bits, then 16 zeros
    float32 to bfloat16   the upper 16 bits of x + 0x7FFF + bit 16 of x, read as integers: to nearest, ties to even
    float64 or an integer to 16 bits: by way of float32, as in torch
    a bfloat16 is finite  if not all bits of its exponent, 0x7F80, are set

Imports torch only to convert from or to a tensor, and to calculate with float8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.errors import SMTError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = {
    **{name: np.dtype(name) for name in ("float32", "float16", "float64", "complex64", *INTEGERS)},
    "bfloat16": np.dtype([("bfloat16", np.uint16)], align=True),
    **{name: np.dtype([(name, np.uint8)]) for name in FLOAT8},
}


def dtype_name(values: np.ndarray) -> str:
    """Return torch's name of an array's dtype, such as "bfloat16"."""
    return values.dtype.names[0] if values.dtype.names else values.dtype.name


def torch_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def raw(values: np.ndarray) -> np.ndarray:
    """Return the bytes of an array, in row-major order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def bits(values: np.ndarray) -> np.ndarray:
    """Return the bits of values as unsigned integers, in the same shape."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(values.shape)


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array, which shares its memory if the tensor is contiguous on the CPU.

    Raises:
        SMTError: the tensor's dtype is none of `DTYPES`, such as a quantised tensor's.
    """
    import torch

    name = torch_name(tensor.dtype)
    if name not in DTYPES:
        raise SMTError(f"a tensor of {name} cannot be stored; expected one of {', '.join(DTYPES)}.")
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return values.view(DTYPES[name]).reshape(tuple(tensor.shape))


def as_tensor(values: np.ndarray) -> Tensor:
    """Return an array as a tensor, which shares its memory if the array is contiguous, aligned and writable."""
    import torch

    writable = np.require(values, requirements=["C", "A", "W"])
    return torch.from_numpy(raw(writable)).view(getattr(torch, dtype_name(values))).view(values.shape)


def all_finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite."""
    name = dtype_name(values)
    if name == "bfloat16":
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return name not in (*FLOATS, *FLOAT8) or bool(np.isfinite(_with_arithmetic(values)).all())


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in another dtype, rounded as torch rounds them; the same array if it already has this dtype."""
    if dtype_name(values) == dtype:
        return values
    values = _with_arithmetic(values)
    # Values too large for the dtype become infinite, and NaN stays NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype in ("bfloat16", "float16"):
            values = values.astype(np.float32, copy=False)
        return _to_bfloat16(values) if dtype == "bfloat16" else values.astype(DTYPES[dtype], copy=False)


def wider(first: str, second: str) -> str:
    """Return the smallest dtype in `FLOATS` that holds every value of both dtypes."""
    sizes = {DTYPES[name].itemsize: name for name in (first, second)}
    return "float32" if first != second and len(sizes) == 1 else sizes[max(sizes)]


def _with_arithmetic(values: np.ndarray) -> np.ndarray:
    """Return values in a dtype that numpy can calculate with: bfloat16 and float8 as float32, others unchanged."""
    name = dtype_name(values)
    if name == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return as_array(as_tensor(values).float()) if name in FLOAT8 else values


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding would turn some NaNs into other values.
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    return rounded.astype(np.uint16).view(DTYPES["bfloat16"])
