"""A weight patch: new values of one tensor of a checkpoint, for a server that changes its weights in place.

    sparse   the n values at `indices` of the flattened tensor; the others stay
    dense    all values of the tensor, with no indices

With v bytes in a value and an index of i bytes, which is 4 where the tensor has at most 2^31 values and else 8, a patch
takes n (v + i) bytes if sparse and n v if dense. So the n trained weights of a step take 6 n bytes in bfloat16, where
all N weights of the model take 2 N: less, if fewer than a third of the weights are trained.

In a block of br x bc weights of a weight [O, I], row j of block (r, c) is a run of neighbours in memory: the bc indices
from (r br + j) I + c bc on. In a transposed weight [I, O], columns are such runs: the br indices from
(c bc + j) O + r br on. Sorting the runs sorts the indices.

This is the format of vLLM's loader of patches in checkpoint coordinates (vLLM #50723, #53751), which marks unchanged
values with NaN. So values must not be NaN, and a sparse patch holds floats. `vllm_patches.py` converts it for vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid

MAX_BYTES = 2**26
# Bytes of the largest value and the largest index, 8 each.
SMALLEST_MAX_BYTES = 16


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """New values of one tensor.

    Attributes:
        name: of the tensor in the checkpoint.
        shape: of the whole tensor.
        dtype: of the tensor.
        values: [n] in this dtype.
        indices: [n] int32 or int64, ascending, each once: places in the flattened tensor; None for all of them.

    Raises:
        SMTError: an attribute is not as described, or a value is NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        numel, (values, indices) = math.prod(self.shape), (self.values, self.indices)
        expected = (numel,) if indices is None else (indices.numel(),)
        if values.dtype != self.dtype or tuple(values.shape) != expected:
            self._refuse(
                f"{expected[0]:,} values of {self.dtype} in one dimension", f"{values.dtype} of {list(values.shape)}"
            )
        if indices is not None and (indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1):
            self._refuse("indices of int32 or int64 in one dimension", f"{indices.dtype} of {list(indices.shape)}")
        if indices is not None and not self.dtype.is_floating_point:
            self._refuse("floats at indices, or all values", f"{self.dtype}, which has no NaN for what stays")
        if indices is not None and len(indices):
            if not bool((indices[1:] > indices[:-1]).all()):
                self._refuse("ascending indices, each once", "unsorted or repeated ones")
            # Compared as tensors, 2^31 would not fit into int32.
            first, last = int(indices[0]), int(indices[-1])
            if first < 0 or last >= numel:
                self._refuse(f"indices from 0 to {numel - 1:,}", f"{first:,} to {last:,}")
        if bool(values.isnan().any()):
            self._refuse("numbers", "NaN, which would mean an unchanged value; if training diverged, go back")

    @property
    def size(self) -> int:
        """Bytes of values and indices."""
        return self.values.nbytes + (0 if self.indices is None else self.indices.nbytes)

    def _refuse(self, expected: str, found: str) -> None:
        raise SMTError(f"a patch of `{self.name}` {list(self.shape)} should have {expected}, got {found}.")


def check_max_bytes(max_bytes: int) -> None:
    """Raise `SMTError` unless a patch of one value fits."""
    if max_bytes < SMALLEST_MAX_BYTES:
        raise SMTError(f"max_bytes must be at least {SMALLEST_MAX_BYTES}, for a value and its index; got {max_bytes}.")


def patches_of_blocks(
    name: str,
    grid: BlockGrid,
    block_indices: Tensor,
    blocks: Tensor,
    max_bytes: int,
    stacked: tuple[int, int] | None = None,
) -> Iterator[WeightPatch]:
    """Yield the patches of a weight with trained blocks, in the order of their indices.

    Args:
        name: of the weight in the checkpoint.
        grid: cuts the weight into blocks.
        block_indices: [n, 2] (row, column) of each block, in any order.
        blocks: [n, br, bc] values, in the dtype of the weight.
        max_bytes: bound on the bytes of a patch.
        stacked: (index, number of experts) of an expert's matrix in a tensor of all experts.
    """
    (rows, columns), (br, bc) = block_indices.to(blocks.device).long().unbind(1), grid.block_shape
    if grid.transposed:
        rows, columns, br, bc, blocks = columns, rows, bc, br, blocks.transpose(1, 2)
    lines = rows[:, None] * br + torch.arange(br, device=rows.device)
    starts, order = (lines * grid.stored_columns + columns[:, None] * bc).flatten().sort()
    indices = (starts[:, None] + torch.arange(bc, device=rows.device)).flatten()
    shape = grid.stored_shape
    if stacked is not None:
        expert, experts = stacked
        indices, shape = indices + expert * math.prod(shape), (experts, *shape)
    yield from _cut(name, shape, blocks.reshape(-1, bc)[order].flatten(), indices, max_bytes)


def patches_of_whole(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[WeightPatch]:
    """Yield patches that replace whole tensors: first sparse ones, for tensors too large for a patch, then dense ones.

    Args:
        tensors: name in the checkpoint -> all values. Tensors of other values than floats are not split.
        max_bytes: bound on the bytes of a patch.
    """
    large = {
        name: values for name, values in tensors.items() if values.is_floating_point() and values.nbytes > max_bytes
    }
    for name, values in large.items():
        yield from _cut(name, tuple(values.shape), values.reshape(-1), None, max_bytes)
    for name, values in tensors.items():
        if name not in large:
            yield WeightPatch(name, tuple(values.shape), values.dtype, values.reshape(-1))


def _cut(
    name: str, shape: tuple[int, ...], values: Tensor, indices: Tensor | None, max_bytes: int
) -> Iterator[WeightPatch]:
    """Yield patches of at most `max_bytes`; without indices, of all values in their order."""
    dtype = torch.int32 if math.prod(shape) <= 2**31 else torch.int64
    count, start = max_bytes // (values.element_size() + dtype.itemsize), 0
    for some in values.split(count):
        end = start + len(some)
        places = torch.arange(start, end, device=values.device) if indices is None else indices[start:end]
        yield WeightPatch(name, shape, values.dtype, some, places.to(dtype))
        start = end
