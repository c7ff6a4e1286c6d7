"""Rewrite a model for sparse training, and make it plain again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.experts import find_expert
from smt_trainer.model.fingerprint import Fingerprint, persistent_buffers
from smt_trainer.model.merged import mark_merged
from smt_trainer.model.newly_initialised import new_rows, newly_initialised
from smt_trainer.model.quantised import floating_dtype, is_quantised, quantization_of
from smt_trainer.model.tensor_parallel import is_tensor_parallel, style_of
from smt_trainer.model.untunable import REPLACED
from smt_trainer.model.whole import find_whole, get_whole, stored_whole
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.tokens import lost_rows
from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.sparse.changed_base import warn_of_changed_base
from smt_trainer.sparse.conv import block_conv_of
from smt_trainer.sparse.dequantise import dequantise
from smt_trainer.sparse.embedding import convert_embedding
from smt_trainer.sparse.experts import convert_expert
from smt_trainer.sparse.fit import base_dtype, match_targets
from smt_trainer.sparse.linear import SMTConv1D, SMTLinear
from smt_trainer.sparse.plain import CANNOT_HOLD, save_as_before, save_as_plain
from smt_trainer.sparse.state import SMTState, get_state, has_quantised_blocks, set_state

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def convert_to_smt(model: Model, selection: BlockSelection) -> Model:
    """Freeze a model in place and rewrite the linears of a selection so that only the chosen blocks are trained.

    Args:
        model: a plain model; its modules keep their identity, names, hooks and ties.
        selection: the blocks to train; its config sets the `master_dtype` and what is trained whole.

    Returns:
        The same model.

    Raises:
        SMTError: the model is already rewritten, lacks the selection's modules in the selection's shapes, or has new
            tokens that the selection leaves out. Nothing is changed.
    """
    linears = match_targets(model, selection)
    _refuse_replaced_forwards(linears)
    dtype = base_dtype(model, linears)
    whole = find_whole(model, selection.config, linears)
    stored = stored_whole(model.state_dict(keep_vars=True), whole)
    lost = [name for name in lost_rows(model, selection) if name not in stored]
    if lost:
        raise SMTError(
            f"`{lost[0]}` has rows for tokens that the checkpoint of the model does not have, and the selection leaves "
            "some out, so neither the base nor the delta could restore them. Add them: select_tokens(model, new_ids, "
            "beside=selection)."
        )
    new = frozenset(newly_initialised(model))
    rows = {name: found.start for name, found in new_rows(model).items() if name not in stored}
    quantization = quantization_of(model)
    left_out = {*new, *stored} - rows.keys()
    fingerprint = Fingerprint.of(model, floating_dtype(model) if quantization else dtype, left_out, rows)
    warn_of_changed_base(model, fingerprint)
    _warn_of_gradient_hooks(linears)
    return convert_checked(model, SMTState(selection, whole, fingerprint, dtype, new, quantization=quantization))


def _refuse_replaced_forwards(linears: Mapping[str, Target]) -> None:
    """Raise `SMTError` if the `forward` of a linear is replaced on the instance, which would hide that of the class."""
    modules = {name: linear for name, linear in linears.items() if isinstance(linear, nn.Module)}
    replaced = [name for name, one in modules.items() if "forward" in vars(one) and not is_tensor_parallel(one)]
    if replaced:
        raise SMTError(
            f"the forward of `{replaced[0]}` {REPLACED}, so its blocks would get no gradient. Load the model without "
            "that."
        )


def _warn_of_gradient_hooks(linears: Mapping[str, Target]) -> None:
    """Warn of hooks on the gradients of weights, which get none from now on."""
    hooked = [
        name
        for name, linear in linears.items()
        if linear.weight._backward_hooks or getattr(linear.weight, "_post_accumulate_grad_hooks", None)
    ]
    if hooked:
        logger.warning(
            "%d weights with gradient hooks, such as that of `%s`, get blocks. The hooks will not be called: only "
            "the blocks get a gradient. Register hooks on the parameters named `.blocks`, once the model is rewritten.",
            len(hooked),
            hooked[0],
        )


def convert_checked(model: Model, state: SMTState) -> Model:
    """Rewrite a plain model that is known to fit, and store its state in it."""
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    statistics = {name: buffer.detach().clone() for name, buffer in persistent_buffers(model)}
    # Newly initialised parameters are stored in any case, but trained only if the user has not frozen them.
    frozen = state.newly_initialised - trainable if trainable else frozenset()
    convert_modules(model, state.selection, state.whole, getattr(torch, state.selection.config.master_dtype), frozen)
    set_state(model, replace(state, was_trainable=trainable, statistics=statistics))
    save_as_plain(model)
    return model


def convert_modules(
    model: Model,
    selection: BlockSelection,
    whole: Iterable[str],
    master_dtype: torch.dtype,
    frozen: Collection[str] = (),
) -> Model:
    """Rewrite a model, which may be on the meta device, without any checks and without storing a state.

    Args:
        model: a plain model that is known to fit.
        selection: the blocks to train.
        whole: full names of the modules and biases to train whole.
        master_dtype: dtype of the trainable blocks.
        frozen: names in `whole` that are not trained.
    """
    model.requires_grad_(False)
    for name, block_indices in selection.block_indices.items():
        grid = selection.grids[name]
        expert = find_expert(model, name)
        if expert is not None:
            convert_expert(expert, grid, torch.from_numpy(block_indices), master_dtype)
            continue
        linear: Any = model.get_submodule(name)
        if grid.embedding:
            convert_embedding(model, linear, grid, torch.from_numpy(block_indices), master_dtype)
            continue
        kind: type[BlockModule] = SMTConv1D if grid.transposed else SMTLinear
        if grid.kernel:
            kind = block_conv_of(linear)
        if is_quantised(linear):
            from smt_trainer.sparse.quantised_linear import block_linear_of

            kind = block_linear_of(linear)
            linear.dense_dtype = base_dtype(model, {name: linear})
        if is_tensor_parallel(linear):
            from smt_trainer.sparse.tensor_parallel import SlicedSMTLinear

            kind, linear.style = SlicedSMTLinear, style_of(model, name)
        kind.from_plain(linear, grid, torch.from_numpy(block_indices), master_dtype)
    for name in whole:
        part = get_whole(model, name)
        if name not in frozen and isinstance(part, (nn.Module, nn.Parameter)):
            part.requires_grad_(True)
    return model


def merge_and_unload(model: Model, *, onto: str | None = None) -> Model:
    """Write the trained blocks into the dense weights, make the model plain again in place, and return it.

    The weights are bit-identical to those that forward used in training. Parameters that required a gradient before
    rewriting do so again.

    Args:
        model: rewritten.
        onto: "dequantized" for a quantised model: all its quantised weights become dense, in the dtype of its other
            weights (`sparse/dequantise.py`). Required where blocks lie in them.

    Raises:
        SMTError: the model trains no blocks, or `onto` is missing for blocks in quantised weights or given for a plain
            model.
    """
    check_onto_for_merge(model, onto)
    state = get_state(model)
    save_as_before(model)
    if onto is not None:
        dequantise(model)
    for _, linear in list(block_modules(model)):
        linear.to_plain()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.was_trainable)
    del model.smt_state
    # Its values are no longer those of the base it was loaded from.
    mark_merged(model)
    return model


def check_onto_for_merge(model: nn.Module, onto: str | None) -> None:
    """Raise `SMTError` if a model trains no blocks, or `onto` is missing for blocks in quantised weights, or given for
    a plain model."""
    get_state(model)
    if has_quantised_blocks(model) and onto != "dequantized":
        raise SMTError(CANNOT_HOLD)
    if onto is not None and quantization_of(model) is None and not has_quantised_blocks(model):
        raise SMTError(f"onto={onto!r} is for quantised weights, and those of this model are plain. Leave it out.")
    if onto not in (None, "dequantized"):
        raise SMTError(f"onto must be 'dequantized' or left out, got {onto!r}.")
