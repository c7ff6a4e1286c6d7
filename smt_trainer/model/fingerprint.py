"""Compute the fingerprint of a base: a checksum of each of its tensors, by which a delta recognises its base.

    checksum(W) = sum of the sampled values of W, read as 64-bit integers (32-bit if all are sampled), modulo 2^64

In a tensor of at most `SAMPLED_IN_FULL` values all are sampled; in a larger one, `RUN` neighbours out of every `stride`
values in row-major order. The stride gives a model about `RUNS` runs, so a fingerprint takes some six milliseconds,
whatever the size of the model (recipes/benchmarks/results/fingerprint.md). It is a power of two and depends on the size
of the whole model, including tensors that the fingerprint leaves out. So fingerprints of the same base sample the same
values and can be compared without the base, with or without a new head. In each tensor the stride is increased until it
shares no factor but 2 with the row length, so that runs begin all over the columns. With N values in the model, the b
rows of a block meet about b (b + RUN) RUNS / N runs: one in two blocks of 64x64 in 135 million values. A base that was
tuned in any way differs in many runs. Norms and biases are compared value by value. If the vocabulary has grown since,
only the base's rows are sampled (`rows`). The sum does not depend on its order, on the device or on how the checkpoint
is sharded.

For a weight that bitsandbytes has quantised, the indices are sampled (`codes`), so the same base has the same
fingerprint when quantised in the same way. They are compared only with a model that is quantised, too.

Values are first rounded to the dtype of the base and then read as float32 (float64 stays). So the same base has the
same fingerprint in every dtype that is at least as precise. Names are compared without the prefix of the base model
(`model.`).

The sums are computed on numpy arrays, so a base on disk is compared without torch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.arrays import as_array, cast, dtype_name, torch_name
from smt_trainer.model.names import BLOCK_INDICES, find_names, plain_name
from smt_trainer.tensor_file import read_runs
from smt_trainer.tensor_header import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SAMPLED_IN_FULL, RUN, RUNS = 16384, 64, 8192
# The least number of runs in a tensor of more than `SAMPLED_IN_FULL` values, approximately.
FEWEST = 16


@dataclass(frozen=True)
class Fingerprint:
    """The checksums of a base.

    Attributes:
        dtype: dtype that values are rounded to, such as "bfloat16".
        stride: number of values from the start of one run to the next.
        checksums: name of a parameter or buffer -> 16 hexadecimal digits; tied ones once.
        codes: the same for quantised weights.
        rows: name of a tensor that had more rows in training -> number of its rows in the base.
    """

    dtype: str
    stride: int
    checksums: dict[str, str]
    codes: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, dtype: torch.dtype, without: Iterable[str] = (), rows: Mapping[str, int] | None = None
    ) -> Fingerprint:
        """Return the fingerprint of a plain model; a collective operation if the model is sharded.

        Args:
            model: with the values of the base.
            dtype: of the base.
            without: names of tensors that the base does not have, or that the delta holds whole.
            rows: name of a tensor that has more rows than in the base -> number of its rows in the base.
        """
        from smt_trainer.model.sharded import full_shape, full_tensor

        left_out, rows, name_of_dtype = set(without), dict(rows or {}), torch_name(dtype)
        tensors = dict(saved_tensors(model))
        stride = _stride(full_shape(tensor) for tensor in tensors.values())
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        samples = [sample(full_tensor(tensor), stride, rows.get(name)) for name, tensor in tensors.items()]
        sums = dict(zip(tensors, _checksums(samples, name_of_dtype), strict=True))
        codes = {name: sums.pop(name) for name, tensor in tensors.items() if is_code(tensor)}
        return cls(name_of_dtype, stride, sums, codes, {name: rows[name] for name in tensors if name in rows})

    @classmethod
    def read(
        cls, folder: Path, tensors: Mapping[str, StoredTensor], dtype: str, without: Collection[str] = ()
    ) -> Fingerprint:
        """Return the fingerprint of a base on disk: the same as `of` returns for the model loaded from it.

        Args:
            folder: of the checkpoint.
            tensors: name of each tensor of `saved_tensors` -> where it lies.
            dtype: of the base.
            without: names of tensors that the delta holds whole.
        """
        stride = _stride(stored.shape for stored in tensors.values())
        compared = {name: [stored] for name, stored in tensors.items() if name not in without}
        sampled = {name: read_sample(folder, parts, stride) for name, parts in compared.items()}
        return cls(dtype, stride, dict(zip(sampled, _checksums([*sampled.values()], dtype), strict=True)))

    @property
    def digest(self) -> str:
        """64 hexadecimal digits for all checksums together."""
        text = "".join(f"{name} {checksum}\n" for name, checksum in sorted((self.checksums | self.codes).items()))
        return hashlib.sha256(f"{self.dtype} {self.stride}\n{text}".encode()).hexdigest()

    def differences(
        self, names: Iterable[str], sampled: Callable[[str, int, int | None], np.ndarray], *, quantised: bool = False
    ) -> list[str]:
        """Return the names of this base's tensors that have other values in another model or checkpoint. Tensors that
        are missing there are skipped, since checkpoints may store them under converted names.

        Args:
            names: of the other tensors.
            sampled: returns the sample of one of them, given its name, the stride, and its rows that count (None: all).
            quantised: whether weights that were quantised in this base are quantised there, too, and are compared.
        """
        expected = self.checksums | self.codes if quantised else self.checksums
        found = find_names(expected, names)
        samples = [sampled(other, self.stride, self.rows.get(name)) for name, other in found.items()]
        sums = dict(zip(found, _checksums(samples, self.dtype), strict=True))
        return [name for name, checksum in sums.items() if checksum != expected[name]]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names of this base's tensors, apart from quantised ones, that are not among others."""
        found = find_names(self.checksums, names)
        return [name for name in self.checksums if name not in found]

    def differences_on_disk(self, folder: Path, tensors: Mapping[str, Sequence[StoredTensor]]) -> list[str]:
        """Return the `differences` of tensors in the files of a folder, each given as the parts that it consists of."""
        return self.differences(tensors, lambda name, stride, rows: read_sample(folder, tensors[name], stride, rows))

    def differences_in(self, model: nn.Module, *, quantised: bool = False) -> list[str]:
        """Return the `differences` to a model; a collective operation if the model is sharded."""
        from smt_trainer.model.sharded import full_tensor

        tensors = dict(saved_tensors(model))
        return self.differences(
            tensors,
            lambda name, stride, rows: sample(full_tensor(tensors[name]), stride, rows),
            quantised=quantised,
        )


def is_code(tensor: Tensor) -> bool:
    """Return whether a tensor holds the indices of a quantised weight, packed into some dtype."""
    return hasattr(tensor, "quant_state") or not tensor.is_floating_point()


def sample(tensor: Tensor, stride: int, rows: int | None = None) -> np.ndarray:
    """Copy the sampled values of a tensor, or of its first `rows` rows: runs [n, RUN], or all [n] of a small tensor."""
    if rows is not None and tensor.ndim:
        tensor = tensor[:rows]
    if is_code(tensor):
        import torch

        tensor = tensor.detach().view(torch.uint8)
    count, step, length = _runs(tuple(tensor.shape), stride)
    runs = as_array(tensor.reshape(-1)[: count * step].reshape(count, step)[:, :length]).copy()
    return runs[0] if count == 1 else runs


def read_sample(folder: Path, parts: Sequence[StoredTensor], stride: int, rows: int | None = None) -> np.ndarray:
    """Read the values that `sample` would return of a tensor in the files of a folder, or of several parts of one that
    follow one another; only the first `rows` rows of a tensor in one part."""
    first, *others = parts
    shape = first.shape if rows is None or not first.shape else (min(rows, first.shape[0]), *first.shape[1:])
    if others:
        # For the choice of runs, only the size and the last dimension matter.
        shape = (sum(math.prod(part.shape[:-1]) for part in parts), first.shape[-1])
    count, step, length = _runs(shape, stride)
    runs = read_runs(folder, parts, count, step, length)
    return runs[0] if count == 1 else runs


def _stride(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the stride from one run to the next in a model whose tensors have these shapes."""
    return 2 ** round(math.log2(max(RUN, sum(map(math.prod, shapes)) / RUNS)))


def _runs(shape: tuple[int, ...], stride: int) -> tuple[int, int, int]:
    """Return the number of runs in a tensor, the stride from one to the next, and the number of values in each."""
    numel = math.prod(shape)
    if numel <= SAMPLED_IN_FULL:
        return 1, numel, numel
    step = _apart(min(stride, numel // FEWEST), shape[-1])
    return numel // step, step, RUN


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
    """Yield the persistent buffers of a plain or rewritten model with their full names, except `block_indices`."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and name != BLOCK_INDICES:
                yield f"{plain_name(path)}.{name}" if path else name, buffer


@functools.cache
def _apart(stride: int, columns: int) -> int:
    """Return the next even stride that shares no factor but 2 with the row length."""
    stride += stride % 2
    while math.gcd(stride, columns) > 2:
        stride += 2
    return stride


def _checksums(samples: list[np.ndarray], dtype: str) -> list[str]:
    """Return the checksum of each sample. Samples of one dtype and rank are summed together, to save numpy calls."""
    kinds: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        kinds.setdefault((dtype_name(sample), sample.ndim), []).append(index)
    found = [""] * len(samples)
    for indices in kinds.values():
        values = cast(np.concatenate([samples[index] for index in indices]), dtype)
        values = values if dtype == "float64" else cast(values, "float32")
        # Two neighbours in a run are read as one int64; a small tensor may have an odd number of values.
        integers = values.view(np.int64).sum(1) if values.ndim == 2 else values.view(np.int32).astype(np.int64)
        counts = np.array([len(samples[index]) for index in indices]) * (len(integers) // max(len(values), 1))
        totals = np.concatenate([[0], integers.cumsum()])
        ends = counts.cumsum()
        for index, total in zip(indices, (totals[ends] - totals[ends - counts]).tolist(), strict=True):
            found[index] = f"{total % 2**64:016x}"
    return found
