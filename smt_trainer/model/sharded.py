"""Parameters whose values are spread over ranks: FSDP2's and DeepSpeed ZeRO-3's.

Each rank holds one run of a weight's values in row-major order: FSDP2 whole rows (a DTensor sharded in dimension 0),
ZeRO-3 an equal share of the flat weight, which may begin and end inside a row (`ds_tensor`). `full_tensor` brings the
whole value together, `full_tensors` those of many; `local_parts` gives what this rank holds as rectangles of the
weight, to be written in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from smt_trainer.errors import SMTError


class Part(NamedTuple):
    """A rectangle of a weight [O, I] that lies on this rank: `values` are weight[row:, column:] of its own size."""

    values: Tensor
    row: int
    column: int


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned this parameter: it looks empty between uses."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of the parameter between uses."""
    return isinstance(parameter, DTensor) or is_partitioned(parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole value, detached. A collective when the parameter is sharded: all ranks call it in the same order."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def full_tensors(parameters: Sequence[Tensor]) -> list[Tensor]:
    """`full_tensor` of many parameters; those that FSDP2 shards alike come together in a single collective."""
    alike: dict[tuple, list[DTensor]] = {}
    for parameter in parameters:
        if isinstance(parameter, DTensor) and Shard(0) in parameter.placements:
            alike.setdefault((parameter.device_mesh, parameter.placements, parameter.dtype), []).append(parameter)
    gathered = {id(each): whole for group in alike.values() for each, whole in zip(group, _gather(group), strict=True)}
    return [gathered[id(each)] if id(each) in gathered else full_tensor(each) for each in parameters]


def _gather(parameters: list[DTensor]) -> Iterator[Tensor]:
    """The whole values of parameters that lie over the same ranks, as many rows of each on every rank but the last."""
    mesh, dimension = parameters[0].device_mesh, parameters[0].placements.index(Shard(0))
    ranks = mesh.size(dimension)
    sizes = [-(-parameter.shape[0] // ranks) * parameter.shape[1:].numel() for parameter in parameters]
    locals_ = [parameter.to_local().detach().flatten() for parameter in parameters]
    message = torch.cat([F.pad(local, (0, size - len(local))) for local, size in zip(locals_, sizes, strict=True)])
    received = message.new_empty(ranks * len(message))
    dist.all_gather_into_tensor(received, message, group=mesh.get_group(dimension))
    for parameter, part in zip(parameters, received.view(ranks, -1).split(sizes, dim=1), strict=True):
        yield part.flatten()[: parameter.numel()].view(parameter.shape)


def local_tensor(tensor: Tensor) -> Tensor:
    """What FSDP2 keeps on this rank of a tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_like(local: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a tensor of which each rank holds `local`, sharded as FSDP2 shards the parameter; else `local`."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    local = local.to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride()).full_tensor()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a whole value that every rank holds.

    Raises:
        SMTError: ZeRO-3 has partitioned the parameter; its optimizer keeps a copy of its own.
    """
    if is_partitioned(parameter):
        raise SMTError("values cannot be put into parameters that ZeRO-3 has partitioned; load them before training.")
    if isinstance(parameter, DTensor):
        local, row = parameter.to_local(), _first_row(parameter)
        local.copy_(value[row : row + len(local)])
    else:
        parameter.copy_(value)


def local_parts(parameter: Tensor) -> list[Part]:
    """What this rank holds of a weight, as views: writing to all of them writes to the weight.

    Raises:
        SMTError: the weight is sharded other than by rows (tensor parallelism).
    """
    if isinstance(parameter, DTensor):
        return [part for part in [Part(parameter.to_local().detach(), _first_row(parameter), 0)] if part.values.numel()]
    if is_partitioned(parameter):
        return _flat_parts(parameter)
    return [Part(parameter.detach(), 0, 0)]


def _first_row(weight: DTensor) -> int:
    row, rows = 0, weight.shape[0]
    for dimension, placement in enumerate(weight.placements):
        if placement.is_replicate():
            continue
        if placement != Shard(0) or rows != weight.shape[0]:
            raise SMTError(f"blocks are written back to weights sharded by rows, got placements {weight.placements}.")
        chunk = -(-rows // weight.device_mesh.size(dimension))
        row = min(rows, chunk * weight.device_mesh.get_local_rank(dimension))
    return row


def _flat_parts(weight: Tensor) -> list[Part]:
    """The head of a row, whole rows and the tail of a row, of a flat share of the weight."""
    share, columns = weight.ds_tensor.detach(), full_shape(weight)[1]
    start = share.numel() * dist.get_rank(weight.ds_process_group)
    end = min(start + share.numel(), weight.ds_numel)
    # Parameters below the persistence threshold are kept whole besides.
    parts = [Part(weight.detach(), 0, 0)] if weight.numel() == weight.ds_numel else []
    while start < end:
        row, column = divmod(start, columns)
        length = (end - start) // columns * columns if column == 0 and end - start >= columns else 0
        length = length or min(columns - column, end - start)
        taken, share = share[:length], share[length:]
        parts.append(Part(taken.view(-1, min(columns, length)), row, column))
        start += length
    return parts
