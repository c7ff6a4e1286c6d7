"""One base in memory, many deltas: put the values of a delta into a model, and take them out again.

A delta changes n blocks of m weights in fixed places P, and some tensors whole. Swapping it in keeps W[P] and writes
the blocks there; swapping it out writes W[P] back. Both copy n m weights and nothing else, so the model runs as fast as
without, and afterwards it is bit for bit what it was.

A model that trains blocks no longer has the base's values under them. So it takes only deltas of the same blocks, such
as one of an earlier step of its run: its blocks, in their master dtype, are exchanged with the delta's, and so are the
weights under them. After swapping out, training can continue as if nothing had happened.

Swapping changes the only copy of the weights, without a lock, so it is not thread-safe: no forward, optimizer step or
other swap may run meanwhile, in this thread or another. A server of several deltas needs a lock around each swap and
the forwards that follow it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from smt_trainer.delta.checks import check_base
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.put import check_same_blocks, differences, put_blocks, whole_destinations
from smt_trainer.errors import SMTError
from smt_trainer.model.base import base_name
from smt_trainer.model.experts import stored_weight
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.merged import is_merged, mark_merged
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.sharded import is_sharded
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.fit import match_targets
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.sparse.whole_tensors import WholeTensors
from smt_trainer.sparse.write_back import one_by_one

# The attribute of a model that holds what is swapped in.
ATTRIBUTE = "smt_swapped"


@dataclass(frozen=True)
class Swapped:
    """What is swapped into a model.

    Attributes:
        delta: the delta whose values the model has.
        before: full name of a linear, or of a whole tensor -> the values that the delta's replaced.
        fingerprint: checksums of the model without the delta.
        was_merged: whether another delta was merged into the model before (see `is_merged`).
        trains: whether the model trains blocks.
    """

    delta: Delta
    before: dict[str, Tensor]
    fingerprint: Fingerprint
    was_merged: bool
    trains: bool


def swap(model: nn.Module, delta: Delta | str | Path | None) -> None:
    """Put the values of a delta into a model, replacing those of a delta swapped in before.

    Each delta must be of this base: its fingerprint is checked, unless the previous delta has the same one. Not
    thread-safe: run no forward meanwhile.

    Args:
        model: the plain base, which stays plain and can be saved; or a model that trains the same blocks as the delta.
            Either may have a delta swapped in; take it out before training, or it takes what was trained with it.
        delta: in memory, or its folder or hub name; None swaps the current one out and restores the values before it.

    Raises:
        SMTError: the delta is damaged, belongs to another base, has another vocabulary, or other blocks than the model
            trains; the model is plain and holds quantised weights; or it was rewritten or merged since a delta was
            swapped in. The model stays unchanged.
    """
    new = delta if isinstance(delta, Delta | None) else Delta.load(find_delta(delta))
    current: Swapped | None = getattr(model, ATTRIBUTE, None)
    if current is not None and current.trains != is_smt_model(model):
        raise SMTError(
            "the model was rewritten or merged while a delta was swapped in, so that cannot be taken out. Load the "
            "base again, and call swap(model, None) before rewriting or merging it."
        )
    if new is not None:
        _check(model, new)
    if current is not None:
        _write(model, current.delta, current.before)
        vars(model).pop(ATTRIBUTE)
        mark_merged(model, current.was_merged)
    if new is not None:
        was_merged = is_merged(model)
        vars(model)[ATTRIBUTE] = Swapped(new, _read(model, new), new.fingerprint, was_merged, is_smt_model(model))
        _write(model, new, {**new.blocks, **new.whole})
        # The model's values are no longer those of the base that it was loaded from.
        mark_merged(model)


@contextlib.contextmanager
def applied(model: nn.Module, delta: Delta | str | Path) -> Generator[nn.Module]:
    """Swap a delta in within this context; afterwards restore what was swapped in before.

    Raises:
        SMTError: as `swap`.
    """
    current: Swapped | None = getattr(model, ATTRIBUTE, None)
    swap(model, delta)
    try:
        yield model
    finally:
        swap(model, None if current is None else current.delta)


def _check(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` unless a delta can be swapped into a model."""
    if is_smt_model(model):
        _check_trained(model, delta)
        return
    if quantization_of(model) is not None or delta.quantization is not None:
        raise SMTError("deltas are swapped in plain weights, not in a quantised base. Use from_delta or load_delta.")
    if any(map(is_sharded, model.parameters())):
        raise SMTError(
            "deltas can be swapped only in whole weights, and this model's are sharded over ranks. Load the base with "
            "the delta in it: from_delta(delta, base=..., distributed_config=...)."
        )
    match_targets(model, delta.selection)
    whole_destinations(model, delta)
    current: Swapped | None = getattr(model, ATTRIBUTE, None)
    if current is None:
        check_base(delta, base_name(model), differences(model, delta))
    elif current.fingerprint != delta.fingerprint:
        # Fingerprints of one base also differ if the deltas hold different tensors whole.
        with _swapped_out(model, current):
            check_base(delta, base_name(model), differences(model, delta))


@contextlib.contextmanager
def _swapped_out(model: nn.Module, current: Swapped) -> Generator[None]:
    """Give a plain model the values of its base within this context."""
    _write(model, current.delta, current.before)
    try:
        yield
    finally:
        _write(model, current.delta, {**current.delta.blocks, **current.delta.whole})


def _check_trained(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` unless a delta holds exactly what a rewritten model trains."""
    check_same_blocks(model, delta)
    whole_destinations(model, delta)
    differing = sorted(WholeTensors.of(model).tensors.keys() ^ delta.whole)
    if differing:
        raise SMTError(
            f"only one of the delta and this model, which trains the same blocks, holds `{differing[0]}`, such as "
            "statistics that forward has changed. Swap deltas into a plain base."
        )


@torch.no_grad()
def _read(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Return copies of a model's values at the places of a delta."""
    destinations = whole_destinations(model, delta) if delta.whole else {}
    found = {name: destinations[name].detach().clone() for name in delta.whole}
    if is_smt_model(model):
        return found | {name: linear.blocks.detach()[linear.row_major_order()] for name, linear in block_modules(model)}
    for name, indices in delta.selection.block_indices.items():
        weight, grid = stored_weight(model, name), delta.selection.grids[name]
        if one_by_one(grid, weight):
            found[name] = weight.new_empty(len(indices), *grid.block_shape)
            torch._foreach_copy_(found[name].unbind(0), grid.views(weight, indices.tolist()))
        else:
            found[name] = grid.gather(weight, torch.from_numpy(indices))
    return found


@torch.no_grad()
def _write(model: nn.Module, delta: Delta, values: dict[str, Tensor]) -> None:
    """Write values at the places of a delta."""
    destinations = whole_destinations(model, delta) if delta.whole else {}
    for name in delta.whole:
        destinations[name].data.copy_(values[name])
    if is_smt_model(model):
        put_blocks(model, values)
        return
    for name, indices in delta.selection.block_indices.items():
        weight, grid = stored_weight(model, name), delta.selection.grids[name]
        if one_by_one(grid, weight):
            torch._foreach_copy_(grid.views(weight, indices.tolist()), values[name].unbind(0))
        else:
            grid.scatter_(weight, torch.from_numpy(indices), values[name])
