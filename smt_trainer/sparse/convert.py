"""Rewrite a model for sparse training, and make it plain again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import full_shape, full_tensor, is_sharded
from smt_trainer.model.targets import (
    has_linear_forward,
    has_plain_weight,
    is_linear,
    is_transposed,
    refuse_adapters,
)
from smt_trainer.model.whole import find_whole, get_whole
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.fingerprint import fingerprint
from smt_trainer.sparse.linear import SMTConv1D, SMTLinear, smt_linears

if TYPE_CHECKING:
    from smt_trainer.model.targets import Linear

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class SMTState:
    """The state of a rewritten model, in its attribute `smt_state`.

    Attributes:
        selection: the blocks it trains.
        whole: full names of the modules and biases trained whole.
        fingerprint: checksum of the chosen blocks before training (see `fingerprint.py`).
        weight_dtype: dtype of the dense weights, in which merging is exact.
        was_trainable: names of the parameters that required a gradient before rewriting.
    """

    selection: BlockSelection
    whole: tuple[str, ...]
    fingerprint: str
    weight_dtype: torch.dtype
    was_trainable: frozenset[str] = frozenset()


def is_smt_model(model: nn.Module) -> bool:
    """Return whether `convert_to_smt` or `load_delta` has rewritten this model."""
    return hasattr(model, "smt_state")


def get_state(model: nn.Module) -> SMTState:
    """Return the state of a rewritten model. Raise `SMTError` for a plain one."""
    state = getattr(model, "smt_state", None)
    if state is None:
        raise SMTError("this model trains no blocks; run SMTTrainer, convert_to_smt or load_delta on it first.")
    return state


def set_state(model: nn.Module, state: SMTState) -> None:
    """Store the state of a rewritten model in it."""
    model.smt_state = state  # pyrefly: ignore[bad-argument-type]  # torch declares tensors and modules only


def convert_to_smt(model: Model, selection: BlockSelection) -> Model:
    """Freeze a model in place and rewrite the linears of a selection so that only the chosen blocks are trained.

    Args:
        model: a plain model; its modules keep their identity, names, hooks and ties.
        selection: the blocks to train; its config sets the `master_dtype` and what is trained whole.

    Returns:
        The same model.

    Raises:
        SMTError: the model is already rewritten, or lacks the selection's modules in the selection's shapes. Nothing
            is changed.
    """
    linears = find_linears(model, selection)
    dtype = next(iter(linears.values())).weight.dtype
    whole = find_whole(model, selection.config, linears)
    return rewrite_as(model, SMTState(selection, whole, fingerprint(model, selection, dtype), dtype))


def rewrite_as(model: Model, state: SMTState) -> Model:
    """Rewrite a plain model that is known to fit, and store its state in it."""
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    rewrite(model, state.selection, state.whole, getattr(torch, state.selection.config.master_dtype))
    set_state(model, replace(state, was_trainable=trainable))
    return model


def rewrite(model: Model, selection: BlockSelection, whole: Iterable[str], master_dtype: torch.dtype) -> Model:
    """Rewrite a model without reading its values; it may be on the meta device.

    Args:
        model: a plain model that is known to fit.
        selection: the blocks to train.
        whole: full names of the modules and biases to train whole.
        master_dtype: dtype of the trainable blocks.
    """
    model.requires_grad_(False)
    for name, block_indices in selection.block_indices.items():
        grid = selection.grids[name]
        kind = SMTConv1D if grid.transposed else SMTLinear
        kind.from_linear(model.get_submodule(name), grid, block_indices, master_dtype)
    for name in whole:
        get_whole(model, name).requires_grad_(True)
    return model


def merge_and_unload(model: Model) -> Model:
    """Write the trained blocks into the dense weights, make the model plain again in place, and return it.

    The weights are bit-identical to those that forward used in training. Parameters that required a gradient before
    rewriting do so again.
    """
    state = get_state(model)
    for _, linear in list(smt_linears(model)):
        linear.to_linear()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.was_trainable)
    del model.smt_state
    return model


def find_linears(model: nn.Module, selection: BlockSelection) -> dict[str, Linear]:
    """Return the linears of a plain model that hold a selection's blocks, by full name.

    Raises:
        SMTError: the model already trains blocks or holds PEFT adapters; or one of the linears is missing, quantised,
            or of another kind or shape.
    """
    if is_smt_model(model):
        raise SMTError("this model already trains blocks; call merge_and_unload on it first.")
    refuse_adapters(model)
    modules = dict(model.named_modules())
    return {name: _expect_linear(modules.get(name), name, selection) for name in selection.block_indices}


def _expect_linear(linear: nn.Module | None, name: str, selection: BlockSelection) -> Linear:
    grid = selection.grids[name]
    if linear is None:
        found = "no such module"
    elif not is_linear(linear) or is_transposed(linear) != grid.transposed:
        found = f"a {type(linear).__name__}"
    elif not has_linear_forward(linear):
        found = f"a {type(linear).__name__}, which has a forward of its own"
    elif full_shape(linear.weight) != grid.stored_shape or not has_plain_weight(linear):
        weight = linear.weight
        found = f"a weight of {'x'.join(map(str, weight.shape))} ({type(weight).__name__}, {weight.dtype})"
    else:
        return linear
    raise SMTError(
        f"the blocks of `{name}` lie in a {'Conv1D' if grid.transposed else 'linear'} with a weight of "
        f"{'x'.join(map(str, grid.stored_shape))}; this model has {found}. They were chosen in "
        f"{selection.base_model or 'another model'}. Load that model unquantised, or choose the blocks again."
    )


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers, with full names, that a rewritten model trains whole; tied ones once."""
    names, seen = get_state(model).whole, set()
    prefixes = tuple(f"{name}." for name in names)
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = plain_name(name)
        if (found in names or found.startswith(prefixes)) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield found, tensor


def plain_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict that the model would have after `merge_and_unload`; leave the model as it is.

    A collective when the model is sharded over ranks. Tied weights stay tied. With `keep=False`, this rank only takes
    part and gets an empty dictionary.
    """
    own = {f"{name}.{part}" for name, _ in smt_linears(model) for part in ("blocks", "block_indices")}
    gathered, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if plain_name(name) in own:
            continue
        if id(tensor) not in gathered:
            whole = full_tensor(tensor)
            gathered[id(tensor)] = whole.cpu() if is_sharded(tensor) and keep else whole
        if keep:
            state[plain_name(name)] = gathered[id(tensor)]
        else:
            gathered[id(tensor)] = None
    return state


def trainable_parameters(model: nn.Module) -> int:
    """Count the parameters that require a gradient; count tied weights once."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters() if parameter.requires_grad)
