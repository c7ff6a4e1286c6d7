"""Rewrite a model for sparse training, and make it plain again."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix, find_expert
from smt_trainer.model.kinds import has_linear_forward, has_plain_weight, is_layer_of, is_linear, kind_of
from smt_trainer.model.made_up import made_up, new_rows
from smt_trainer.model.names import plain_name, unwrapped
from smt_trainer.model.quantised import floating_dtype, is_quantised, keep_differentiable, quantization_of
from smt_trainer.model.sharded import full_shape, full_tensor, is_sharded
from smt_trainer.model.targets import refuse_adapters
from smt_trainer.model.tensor_parallel import (
    is_tensor_parallel,
    refuse_copied,
    refuse_unfitting,
    style_of,
    why_no_slice,
)
from smt_trainer.model.untunable import why_no_embedding
from smt_trainer.model.whole import find_whole, get_whole
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.tokens import lost_rows
from smt_trainer.sparse.conv import block_conv_of
from smt_trainer.sparse.dequantise import dequantise
from smt_trainer.sparse.embedding import hold_tokens
from smt_trainer.sparse.experts import hold_blocks
from smt_trainer.sparse.fingerprint import Fingerprint, persistent_buffers
from smt_trainer.sparse.linear import BlockLinear, SMTConv1D, SMTLinear, smt_linears

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Linear, Target

Model = TypeVar("Model", bound=nn.Module)

CANNOT_HOLD = (
    "the quantised weights of this model cannot hold the trained blocks. Save the delta (save_delta, "
    "trainer.save_model), or say that they are put into the weights made dense: "
    "merge_and_unload(model, onto='dequantized'), trainer.merge_and_save(folder, onto='dequantized')."
)


@dataclass(frozen=True)
class SMTState:
    """The state of a rewritten model, in its attribute `smt_state`.

    Attributes:
        selection: the blocks it trains.
        whole: full names of the modules, parameters and buffers that the delta stores whole.
        base: checksums of the base (see `fingerprint.py`).
        weight_dtype: dtype of the dense weights, in which merging is exact.
        made_up: names of the parameters that loading made up.
        was_trainable: names of the parameters that required a gradient before rewriting.
        statistics: name of a persistent buffer -> its value before training; forward may change it.
        quantization: the `quantization_config` of a quantised base, as JSON types.
    """

    selection: BlockSelection
    whole: tuple[str, ...]
    base: Fingerprint
    weight_dtype: torch.dtype
    made_up: frozenset[str] = frozenset()
    was_trainable: frozenset[str] = frozenset()
    statistics: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None


def is_smt_model(model: nn.Module) -> bool:
    """Return whether `convert_to_smt` or `load_delta` has rewritten this model."""
    return hasattr(model, "smt_state")


def has_quantised_blocks(model: nn.Module) -> bool:
    """Return whether blocks of a rewritten model lie in quantised weights."""
    return any(not linear.is_written for _, linear in smt_linears(model))


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
        SMTError: the model is already rewritten, lacks the selection's modules in the selection's shapes, or has new
            tokens that the selection leaves out. Nothing is changed.
    """
    linears = find_linears(model, selection)
    dtype = base_dtype(model, linears)
    whole = find_whole(model, selection.config, linears)
    stored = stored_whole(model, whole)
    lost = [name for name in lost_rows(model, selection) if name not in stored]
    if lost:
        raise SMTError(
            f"`{lost[0]}` has rows for tokens that the checkpoint of the model does not have, and the selection leaves "
            "some out, so no base and no delta would give them back. Add them: select_tokens(model, new_ids, "
            "beside=selection)."
        )
    new = frozenset(made_up(model))
    rows = {name: found.start for name, found in new_rows(model).items() if name not in stored}
    quantization = quantization_of(model)
    left_out = {*new, *stored} - rows.keys()
    base = Fingerprint.of(model, floating_dtype(model) if quantization else dtype, left_out, rows)
    return rewrite_as(model, SMTState(selection, whole, base, dtype, new, quantization=quantization))


def base_dtype(model: nn.Module, linears: Mapping[str, Target]) -> torch.dtype:
    """Return the dtype of the weights that hold blocks; of quantised ones, that in which they are multiplied."""
    first = next(iter(linears.values()))
    if isinstance(first, ExpertMatrix) or not is_quantised(first):
        return first.weight.dtype
    return getattr(first, "compute_dtype", None) or floating_dtype(model)


def rewrite_as(model: Model, state: SMTState) -> Model:
    """Rewrite a plain model that is known to fit, and store its state in it."""
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    statistics = {name: buffer.detach().clone() for name, buffer in persistent_buffers(model)}
    # What loading made up is stored in any case, but trained only if the user has not frozen it.
    frozen = state.made_up - trainable if trainable else frozenset()
    rewrite(model, state.selection, state.whole, getattr(torch, state.selection.config.master_dtype), frozen)
    set_state(model, replace(state, was_trainable=trainable, statistics=statistics))
    if has_quantised_blocks(model):
        # It would write the weights as bitsandbytes holds them, without the blocks.
        vars(model)["save_pretrained"] = _refuse_to_save
    _save_as_plain(model)
    return model


def _refuse_to_save(*args, **kwargs) -> None:
    """Stands for the `save_pretrained` of a model whose quantised weights cannot hold the blocks."""
    raise SMTError(CANNOT_HOLD)


def _save_as_plain(model: nn.Module) -> None:
    """Let `save_pretrained` and `push_to_hub` write a plain model: leave out what only a rewritten one has."""
    for module, ignored, own in list(_saving_modules(model)):
        _ignore_on_save(module, ignored | own)


def _saving_modules(model: nn.Module) -> Iterator[tuple[nn.Module, set[str], set[str]]]:
    """Yield the modules of a model that have a `save_pretrained` of transformers, itself or parts of it; the keys that
    each leaves out; and the keys in it that only a rewritten model has."""
    for path, module in model.named_modules():
        ignored: Any = getattr(module, "_keys_to_ignore_on_save", ...)
        if ignored is not ...:
            prefix = f"{unwrapped(path)}." if path else ""
            own = {key.removeprefix(prefix) for key in _own_keys(model) if key.startswith(prefix)}
            yield module, set(ignored or ()), own


def _ignore_on_save(model: nn.Module, keys: set[str]) -> None:
    model._keys_to_ignore_on_save = keys  # pyrefly: ignore[bad-argument-type]  # as in `set_state`


def _own_keys(model: nn.Module) -> set[str]:
    """Return the keys that the state dict of a rewritten model has and that of a plain one has not."""
    names = [unwrapped(name) for name, module in model.named_modules() if isinstance(module, BlockLinear)]
    return {f"{name}.{part}" for name in names for part in ("blocks", "block_indices")}


def rewrite(
    model: Model,
    selection: BlockSelection,
    whole: Iterable[str],
    master_dtype: torch.dtype,
    frozen: Collection[str] = (),
) -> Model:
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
        expert = find_expert(model, name)
        if expert is not None:
            hold_blocks(expert, grid, torch.from_numpy(block_indices), master_dtype)
            continue
        linear: Any = model.get_submodule(name)
        if grid.embedding:
            hold_tokens(model, linear, grid, torch.from_numpy(block_indices), master_dtype)
            continue
        kind: type[BlockLinear] = SMTConv1D if grid.transposed else SMTLinear
        if grid.kernel:
            kind = block_conv_of(linear)
        if is_quantised(linear):
            from smt_trainer.sparse.quantised_linear import block_linear_of

            kind = block_linear_of(linear)
            linear.dense_dtype = base_dtype(model, {name: linear})
        if is_tensor_parallel(linear):
            from smt_trainer.sparse.tensor_parallel import SlicedSMTLinear

            kind, linear.style = SlicedSMTLinear, style_of(model, name)
        kind.from_linear(linear, grid, torch.from_numpy(block_indices), master_dtype)
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
        onto: "dequantized" for blocks in quantised weights: all quantised weights of the model become dense, in the
            dtype of the rest of it (`sparse/dequantise.py`).

    Raises:
        SMTError: the model trains no blocks; or `onto` is left open or is not what the base needs.
    """
    refuse_open_merge(model, onto)
    state = get_state(model)
    for module, ignored, own in _saving_modules(model):
        _ignore_on_save(module, ignored - own)
    if onto is not None:
        vars(model).pop("save_pretrained", None)
        dequantise(model)
    for _, linear in list(smt_linears(model)):
        linear.to_linear()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.was_trainable)
    del model.smt_state
    # Its values are no longer those of the base it was loaded from.
    model.smt_merged = True  # pyrefly: ignore[bad-argument-type]  # as in `set_state`
    return model


def refuse_open_merge(model: nn.Module, onto: str | None) -> None:
    """Raise `SMTError` if a model trains no blocks, or it is left open, or said in vain, what they are merged onto."""
    get_state(model)
    if has_quantised_blocks(model) and onto != "dequantized":
        raise SMTError(CANNOT_HOLD)
    if not has_quantised_blocks(model) and onto is not None:
        raise SMTError(f"onto={onto!r} is for blocks in quantised weights, and these are plain. Leave it out.")


def find_linears(model: nn.Module, selection: BlockSelection) -> dict[str, Target]:
    """Return the linears and experts' matrices of a plain model that hold a selection's blocks, by full name.

    Raises:
        SMTError: the model already trains blocks, holds PEFT adapters or is a copy of one that tensor parallelism cuts;
            or one of the linears is missing, quantised, or of another kind or shape.
    """
    if is_smt_model(model):
        raise SMTError("this model already trains blocks; call merge_and_unload on it first.")
    refuse_adapters(model)
    refuse_copied(model)
    keep_differentiable(model)
    modules = dict(model.named_modules())
    found = {
        name: _expect_target(model, modules.get(name) or find_expert(model, name), name, selection)
        for name in selection.block_indices
    }
    refuse_unfitting(found, selection.grids)
    for name in (name for name, linear in found.items() if is_tensor_parallel(linear)):
        style_of(model, name)
    return found


def _expect_target(
    model: nn.Module, linear: nn.Module | ExpertMatrix | None, name: str, selection: BlockSelection
) -> Target:
    grid = selection.grids[name]
    if linear is None:
        found = "no such module"
    elif isinstance(linear, ExpertMatrix):
        if (linear.weight_shape, linear.is_transposed) == (grid.weight_shape, grid.transposed):
            return linear
        found = f"an expert's of {'x'.join(map(str, linear.weight.shape))}"
    elif not (is_linear(linear) or is_convolution(linear) or is_embedding(linear)) or not is_layer_of(linear, grid):
        found = f"a {type(linear).__name__}"
    elif not is_quantised(linear) and not has_linear_forward(linear):
        found = f"a {type(linear).__name__}, which has a forward of its own"
    elif (
        is_embedding(linear)
        and full_shape(linear.weight) == grid.stored_shape
        and (why := why_no_embedding(model, linear))
    ):
        found = f"one that cannot be trained: {why}"
    elif full_shape(linear.weight) != grid.stored_shape or not _can_hold(linear):
        weight = linear.weight
        found = f"a weight of {'x'.join(map(str, weight.shape))} ({type(weight).__name__}, {weight.dtype})"
    else:
        return linear
    raise SMTError(
        f"the blocks of `{name}` lie in {kind_of(grid)} with a weight of "
        f"{'x'.join(map(str, grid.stored_shape))}; this model has {found}. They were chosen in "
        f"{selection.base_model or 'another model'}. Load that model, or choose the blocks again."
    )


def _can_hold(linear: Linear | nn.Embedding) -> bool:
    """Return whether a weight can hold blocks: a plain one, a quantised one, or one cut in equal slices."""
    if is_tensor_parallel(linear):
        return why_no_slice(linear) is None
    return is_quantised(linear) or has_plain_weight(linear)


def changed_statistics(model: nn.Module) -> set[str]:
    """Return the full names of the persistent buffers that forward has changed since the model was rewritten."""
    before = get_state(model).statistics
    return {name for name, buffer in persistent_buffers(model) if not _equal(buffer, before.get(name))}


def stored_whole(model: nn.Module, whole: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model that have, or lie under, one of the names; tied ones once."""
    names = set(whole)
    prefixes, seen, found = tuple(f"{name}." for name in names), set(), {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if (name in names or name.startswith(prefixes)) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(full_tensor(buffer), before.to(buffer.device))


def plain_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict that the model would have after `merge_and_unload`; leave the model as it is.

    A collective when the model is sharded over ranks. Tied weights stay tied. With `keep=False`, this rank only takes
    part and gets an empty dictionary.
    """
    own = _own_keys(model)
    gathered, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if unwrapped(name) in own:
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
