"""Read and write parameters that FSDP2, tensor parallelism or DeepSpeed ZeRO-3 shards over ranks.

FSDP2 gives each rank whole slices of a weight (a DTensor sharded in dimension 0): rows of a matrix, output channels of
a convolution, experts. Tensor parallelism gives it rows or columns of a matrix (dimension 0 or 1), ZeRO-3 an equal
share of the flat weight, which may begin and end inside a row (`ds_tensor`). `full_tensor` gathers one whole value,
`full_tensors` many. `local_parts` returns this rank's part as rectangles of the weight as a matrix, which can be
written in place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from smt_trainer.errors import SMTError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

    class Partitioned(Tensor):
        """A parameter that ZeRO-3 has partitioned."""

        ds_id: int
        ds_shape: torch.Size
        ds_numel: int
        ds_tensor: Tensor
        ds_process_group: dist.ProcessGroup


# Newer releases of torch deprecate the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LocalPart(NamedTuple):
    """A rectangle of a weight as a matrix that this rank holds; `values` starts at weight[row, column]."""

    values: Tensor
    row: int
    column: int


def is_dtensor(parameter: Tensor) -> TypeIs[DTensor]:
    """Return whether FSDP2 or tensor parallelism shards this tensor; importing the class takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def is_partitioned(parameter: Tensor) -> TypeIs[Partitioned]:
    """Return whether ZeRO-3 has partitioned this parameter, which then looks empty between uses."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this rank holds only a part of the parameter between uses."""
    return is_dtensor(parameter) or is_partitioned(parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; for a weight that bitsandbytes packs into 4 bits, before packing."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return tuple(packed.shape)
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def full_tensor(parameter: Tensor) -> Tensor:
    """Return the whole value, detached. Collective if the parameter is sharded: all ranks call it in the same order."""
    if is_dtensor(parameter):
        return parameter.detach().full_tensor()  # pyrefly: ignore[missing-attribute]  # detached, it is still a DTensor
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def full_tensors(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return `full_tensor` of many parameters; gather those that FSDP2 shards alike in one collective."""
    alike: dict[tuple, list[DTensor]] = {}
    for parameter in parameters:
        if is_dtensor(parameter) and _row_dimension(parameter) is not None:
            alike.setdefault((parameter.device_mesh, parameter.placements, parameter.dtype), []).append(parameter)
    gathered = {id(each): whole for group in alike.values() for each, whole in zip(group, _gather(group), strict=True)}
    return [gathered[id(each)] if id(each) in gathered else full_tensor(each) for each in parameters]


def _row_dimension(parameter: DTensor) -> int | None:
    """Return the mesh dimension over which a parameter is sharded by rows; None if there is none."""
    from torch.distributed.tensor import Shard

    return parameter.placements.index(Shard(0)) if Shard(0) in parameter.placements else None


def _gather(parameters: list[DTensor]) -> Iterator[Tensor]:
    """Yield the whole values of parameters sharded alike: ceil(rows / ranks) rows on each rank, fewer on the last."""
    mesh, dimension = parameters[0].device_mesh, _row_dimension(parameters[0])
    ranks = mesh.size(dimension)
    sizes = [-(-parameter.shape[0] // ranks) * parameter.shape[1:].numel() for parameter in parameters]
    locals_ = [parameter.to_local().detach().flatten() for parameter in parameters]
    message = torch.cat([F.pad(local, (0, size - len(local))) for local, size in zip(locals_, sizes, strict=True)])
    received = message.new_empty(ranks * len(message))
    _all_gather(received, message, group=mesh.get_group(dimension))
    for parameter, part in zip(parameters, received.view(ranks, -1).split(sizes, dim=1), strict=True):
        yield part.flatten()[: parameter.numel()].view(parameter.shape)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gather_like(local: Tensor, parameter: Tensor) -> Tensor:
    """Gather a tensor from each rank's `local`, sharded like a DTensor `parameter`; for others, return `local`."""
    if not is_dtensor(parameter):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    local = local.to(mesh.device_type)
    shape, stride = parameter.shape, parameter.stride()
    return type(parameter).from_local(local, mesh, placements, shape=shape, stride=stride).full_tensor()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a whole value that every rank holds.

    Raises:
        SMTError: ZeRO-3 has partitioned the parameter; its optimizer keeps its own copy.
    """
    if is_partitioned(parameter):
        raise SMTError("values cannot be loaded into parameters that ZeRO-3 has partitioned; load before training.")
    if is_dtensor(parameter):
        local = parameter.to_local()
        starts = zip(first_of(parameter), local.shape, strict=True)
        local.copy_(value[tuple(slice(start, start + length) for start, length in starts)])
    else:
        parameter.copy_(value)


def local_parts(parameter: Tensor, columns: int) -> list[LocalPart]:
    """Return the parts of a weight that this rank holds, where the weight is a matrix with this many columns.

    Writing to the parts writes to the weight if it is sharded, or whole and contiguous.

    Raises:
        SMTError: the weight is sharded over ranks other than by rows or columns.
    """
    if is_partitioned(parameter):
        return _flat_parts(parameter, columns)
    values, row, column = parameter.detach(), 0, 0
    if is_dtensor(parameter):
        values, (row, column, *_) = parameter.to_local().detach(), first_of(parameter)
        row = row * parameter.shape[1:].numel() // columns
        # Tensor parallelism may give a rank only some columns of a matrix.
        columns = columns * values.shape[1] // parameter.shape[1]
    return [LocalPart(values.reshape(-1, columns), row, column)] if values.numel() else []


def first_of(weight: DTensor) -> list[int]:
    """Return the index, in each dimension, at which this rank's part of a weight begins.

    Raises:
        SMTError: the weight is sharded in more than one dimension, or not in equal runs (packed weights).
    """
    from torch.distributed.tensor import Shard

    first, is_found = [0] * weight.ndim, False
    for dimension, placement in enumerate(weight.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or is_found:
            raise SMTError(
                f"blocks can be written back only to weights sharded by rows or columns, got {weight.placements}."
            )
        is_found, length = True, weight.shape[placement.dim]
        chunk = -(-length // weight.device_mesh.size(dimension))
        first[placement.dim] = min(length, chunk * weight.device_mesh.get_local_rank(dimension))
    return first


def _flat_parts(weight: Partitioned, columns: int) -> list[LocalPart]:
    """Split a flat share of the weight into the end of a row, whole rows and the start of a row."""
    share = weight.ds_tensor.detach()
    start = share.numel() * dist.get_rank(weight.ds_process_group)
    end = min(start + share.numel(), weight.ds_numel)
    # ZeRO-3 also keeps parameters below the persistence threshold whole.
    parts = [LocalPart(weight.detach().view(-1, columns), 0, 0)] if weight.numel() == weight.ds_numel else []
    while start < end:
        row, column = divmod(start, columns)
        length = (end - start) // columns * columns if column == 0 and end - start >= columns else 0
        length = length or min(columns - column, end - start)
        taken, share = share[:length], share[length:]
        parts.append(LocalPart(taken.view(-1, min(columns, length)), row, column))
        start += length
    return parts
