"""The fingerprint of a base: a checksum of each of its tensors, so that a delta knows the base it belongs to.

    checksum(W) = sum of the sampled values of W, read as 64-bit integers, modulo 2^64

Of a tensor of n values all are sampled if n is at most `WHOLE`; otherwise `RUN` neighbours out of every `STRIDE`, in
row-major order. So a change is sure to be found in a small tensor (norms, biases), in a row, and in any region of a
matrix with some thousand values; a sum costs a small part of loading the model (recipes/benchmarks/results). It does
not depend on the order of the summation, on the device or on how the checkpoint is sharded.

Values are first rounded to the dtype of the base and then read as float32 (float64 stays). So the same base has the
same fingerprint in every dtype that is at least as fine. Names are compared without the prefix of
the base model (`model.`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import full_tensor

WHOLE, RUN, STRIDE = 16384, 64, 4096
# Names of modules that may stand before a name in one place and not in another.
MOST_PREFIXES = 2


@dataclass(frozen=True)
class Fingerprint:
    """The checksums of a base.

    Attributes:
        dtype: dtype that values are rounded to, such as "bfloat16".
        checksums: name of a parameter or buffer -> 16 hexadecimal digits; tied ones once.
    """

    dtype: str
    checksums: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype, without: Iterable[str] = ()) -> Fingerprint:
        """Return the fingerprint of a plain model; a collective when it is sharded.

        Args:
            model: with the values of the base.
            dtype: of the base.
            without: names of tensors that the base does not have.
        """
        left_out = set(without)
        tensors = {name: tensor for name, tensor in saved_tensors(model) if name not in left_out}
        sums = [_sum(full_tensor(tensor), dtype) for tensor in tensors.values()]
        return cls(str(dtype).removeprefix("torch."), dict(zip(tensors, map(_hexadecimal, sums), strict=True)))

    @property
    def digest(self) -> str:
        """64 hexadecimal digits for all checksums together."""
        text = "".join(f"{name} {checksum}\n" for name, checksum in sorted(self.checksums.items()))
        return hashlib.sha256(f"{self.dtype}\n{text}".encode()).hexdigest()

    def differences(self, names: Iterable[str], tensor: Callable[[str], Tensor]) -> list[str]:
        """Return the names of this base's tensors that have other values elsewhere; those that are not there are left
        out, since checkpoints may store them under converted names.

        Args:
            names: of the tensors elsewhere.
            tensor: gives one of them by its name.
        """
        dtype = getattr(torch, self.dtype)
        found = find_names(self.checksums, names)
        return [
            name for name, other in found.items() if self.checksums[name] != _hexadecimal(_sum(tensor(other), dtype))
        ]


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the persistent floating buffers of a model with their full names; tied ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{plain_name(path)}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}{name}", parameter
    yield from ((name, buffer) for name, buffer in persistent_buffers(model) if buffer.is_floating_point())


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the persistent buffers of a plain or rewritten model with their full names, without those of its blocks."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and name != "block_indices":
                yield f"{plain_name(path)}.{name}" if path else name, buffer


def find_names(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return, for each wanted name, the one of `names` that is the same but for a prefix on either side."""
    names = set(names)
    longer: dict[str, list[str]] = {}
    for name in names:
        for ending in _endings(name):
            longer.setdefault(ending, []).append(name)
    found = {}
    for name in wanted:
        candidates = [name] if name in names else longer.get(name, [])
        candidates = candidates or [ending for ending in _endings(name) if ending in names][:1]
        if len(candidates) == 1:
            found[name] = candidates[0]
    return found


def _endings(name: str) -> list[str]:
    """Return what is left of a name without its first part, its first two parts, and so on: `model.` and the like."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(1, min(len(parts) - 1, MOST_PREFIXES + 1))]


def _sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The checksum of a tensor, as a signed integer []."""
    values = tensor.detach()
    if values.numel() > WHOLE:
        values = values.contiguous().as_strided((values.numel() // STRIDE, RUN), (STRIDE, 1))
    else:
        values = values.reshape(-1)
    # A call that converts nothing still takes microseconds, and a model has hundreds of tensors.
    values = values if values.dtype == dtype else values.to(dtype)
    values = values.float() if dtype.itemsize < 4 else values
    # Each two neighbours of 32 bits are one integer, which sums faster.
    return values.view(torch.int64 if values.shape[-1] % 2 == 0 else torch.int32).sum(dtype=torch.int64)


def _hexadecimal(total: Tensor) -> str:
    return f"{int(total) % 2**64:016x}"
