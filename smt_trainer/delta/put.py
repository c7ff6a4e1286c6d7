"""Put a delta that is in memory into a model, if it fits."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from smt_trainer.arrays import torch_name
from smt_trainer.delta.checks import check_base, warn_of_rounding
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.onto import DEQUANTIZED, check_onto, check_same_quantisation
from smt_trainer.errors import SMTError
from smt_trainer.model.base import base_name
from smt_trainer.model.language_model import vocabulary_weights
from smt_trainer.model.names import plain_name
from smt_trainer.model.newly_initialised import new_rows, newly_initialised
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.sharded import assign, full_shape
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.tokens import lost_rows
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.convert import convert_checked
from smt_trainer.sparse.fit import base_dtype, match_targets
from smt_trainer.sparse.state import SMTState, get_state, is_smt_model
from smt_trainer.sparse.whole_tensors import WholeTensors
from smt_trainer.sparse.write_back import write_back

logger = logging.getLogger(__name__)


def put_delta(model: nn.Module, delta: Delta, *, has_weights: bool = True, onto: str | None = None) -> None:
    """Put a delta that is already in memory into a model, like `load_delta` without merging.

    Args:
        model: plain, or one that trains the same blocks. A plain model is resized to the delta's vocabulary.
        delta: what to put into it.
        has_weights: False on a rank that gets the base weights from another rank later; they are not checked then.
        onto: as in `load_delta`.
    """
    if is_smt_model(model):
        check_same_blocks(model, delta)
        destinations = whole_destinations(model, delta)
        _reset_others(model, delta, destinations)
    else:
        quantization = quantization_of(model)
        check_onto(delta, onto, is_quantised=quantization is not None)
        if quantization is not None:
            check_same_quantisation(delta, quantization)
        elif onto == DEQUANTIZED:
            raise SMTError(
                "onto='dequantized' needs the base quantised as in training, and this model is plain. Load it with the "
                "quantization_config of training, or let from_delta do so."
            )
        with _vocabulary_of(delta, model):
            linears = match_targets(model, delta.selection)
            if has_weights:
                check_base(delta, base_name(model), differences(model, delta))
            _refuse_lost(model, delta)
            destinations = whole_destinations(model, delta)
            whole = find_whole(model, delta.selection.config, linears, stored=delta.whole)
            _check_complete(model, delta, whole)
        dtype = base_dtype(model, linears)
        # Modules that the configuration names, and the delta's other whole tensors.
        named = tuple(f"{name}." for name in whole)
        whole = (*whole, *(name for name in delta.whole if not f"{name}.".startswith(named)))
        state = SMTState(delta.selection, whole, delta.fingerprint, dtype, frozenset(delta.unnamed))
        convert_checked(model, replace(state, quantization=quantization))
    dtypes = {name: linear.weight_dtype for name, linear in block_modules(model)}
    dtypes |= {name: destinations[name].dtype for name in delta.whole}
    warn_of_rounding(delta, {name: torch_name(dtype) for name, dtype in dtypes.items()})
    put_blocks(model, delta.blocks)
    for name, tensor in delta.whole.items():
        assign(destinations[name], tensor)


def put_blocks(model: nn.Module, blocks: Mapping[str, Tensor]) -> None:
    """Set the blocks of a rewritten model to values in the selection's order, and write them into its weights."""
    for name, linear in block_modules(model):
        assign(linear.blocks, blocks[name][linear.row_major_order().argsort()])
    write_back(linear for _, linear in block_modules(model))


def differences(model: nn.Module, delta: Delta) -> list[str]:
    """Return the names of the tensors of the delta's base that have other values in a plain model."""
    return delta.fingerprint.differences_in(model, quantised=quantization_of(model) is not None)


@contextlib.contextmanager
def _vocabulary_of(delta: Delta, model: nn.Module) -> Generator[None]:
    """Resize a model's token embeddings to the delta's vocabulary, if the delta stores them whole or trains rows that
    the model lacks; undo this if the context ends in an exception."""
    before = {name: model.get_parameter(name).detach() for name in vocabulary_weights(model)}
    rows = {len(delta.whole[name]): len(values) for name, values in before.items() if name in delta.whole}
    for name, values in before.items():
        new = delta.selection.new_rows(name.removesuffix(".weight"), len(values))
        rows |= {new.stop: new.start} if new else {}
    resize: Any = getattr(model, "resize_token_embeddings", None)
    changes = [(new, old) for new, old in rows.items() if new != old and callable(resize)]
    try:
        for new, _ in changes:
            resize(new, mean_resizing=False)
        yield
    except BaseException:  # Ctrl-C as well; it is raised again
        for _, old in changes:
            resize(old, mean_resizing=False)
            for name, values in before.items():
                assign(model.get_parameter(name), values)
        raise


def _refuse_lost(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` if a model has newly initialised parameters that the delta does not hold."""
    rows = new_rows(model).keys() - lost_rows(model, delta.selection)
    lost = [name for name in newly_initialised(model) if name not in delta.whole and name not in rows]
    if lost:
        raise SMTError(
            f"loading the {type(model).__name__} newly initialised `{lost[0]}`, which the delta does not hold. "
            f"Load the base as {delta.architecture or 'the class of training'}."
        )


def check_same_blocks(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` unless a delta has the same blocks and the same base as a rewritten model."""
    state = get_state(model)
    ours, theirs = state.selection.block_indices, delta.selection.block_indices
    same = ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    if not same or state.fingerprint != delta.fingerprint:
        raise SMTError(
            "the delta holds other blocks than this model trains, or blocks of another base. Load it into the plain "
            "base model instead."
        )


def _reset_others(model: nn.Module, delta: Delta, destinations: Mapping[str, Tensor]) -> None:
    """Reset the whole tensors of a rewritten model that a delta does not hold to the base's values, where known."""
    statistics = get_state(model).statistics
    others = sorted(WholeTensors.of(model).tensors.keys() - delta.whole.keys())
    for name in others:
        if name in statistics:
            assign(destinations[name], statistics[name])
    if kept := [name for name in others if name not in statistics]:
        logger.warning(
            "The delta does not hold %d tensors that this model trains, such as `%s`, and they keep their values: the "
            "model is not the one that the delta was saved from. To get that, load the delta into the plain base.",
            len(kept),
            kept[0],
        )


def whole_destinations(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Return a model's tensors by name; raise `SMTError` unless the delta's whole tensors fit them."""
    destinations = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in delta.whole.items():
        if name not in destinations or full_shape(destinations[name]) != tuple(tensor.shape):
            found = list(full_shape(destinations[name])) if name in destinations else "none"
            raise SMTError(
                f"the delta holds `{name}` of shape {list(tensor.shape)}; this model has {found}. Load the base with "
                "the same head (number of labels) as in training."
            )
    return destinations


def _check_complete(model: nn.Module, delta: Delta, names: Iterable[str]) -> None:
    """Raise `SMTError` unless a delta holds just these modules and biases whole, apart from `unnamed` parameters."""
    prefixes = tuple(f"{name}." for name in names)
    tensors = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    wanted = {id(tensor): name for name, tensor in tensors.items() if f"{name}.".startswith(prefixes)}
    found = {id(tensors[name]): name for name in delta.whole if name in tensors}
    missing = [name for key, name in wanted.items() if key not in found]
    strange = [name for key, name in found.items() if key not in wanted and isinstance(tensors[name], nn.Parameter)]
    strange = [name for name in strange if name not in delta.unnamed]
    if missing or strange:
        raise SMTError(
            f"the delta {'lacks' if missing else 'holds'} `{(missing or strange)[0]}`, which this model "
            f"{'trains' if missing else 'does not train'} whole under the delta's configuration. It is damaged, or the "
            "model has another class than in training."
        )
