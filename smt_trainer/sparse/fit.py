"""Find the modules of a plain model that hold the blocks of a selection, and check that the blocks fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix, find_expert
from smt_trainer.model.kinds import fits_grid, has_linear_forward, has_plain_weight, is_linear, kind_of
from smt_trainer.model.quantised import floating_dtype, is_quantised, keep_differentiable
from smt_trainer.model.sharded import full_shape
from smt_trainer.model.targets import refuse_adapters
from smt_trainer.model.tensor_parallel import (
    is_tensor_parallel,
    refuse_copied,
    refuse_unfitting,
    style_of,
    why_no_slice,
)
from smt_trainer.model.untunable import shared_weights, why_no_embedding
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.state import is_smt_model

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Linear, Target


def match_targets(model: nn.Module, selection: BlockSelection) -> dict[str, Target]:
    """Return the linears and experts' matrices of a plain model that hold a selection's blocks, by full name.

    Raises:
        SMTError: the model already trains blocks, holds PEFT adapters or is a copy of one that tensor parallelism cuts;
            or one of the linears is missing, of another kind or shape, cannot hold blocks, or shares its weight.
    """
    if is_smt_model(model):
        raise SMTError("this model already trains blocks; call merge_and_unload on it first.")
    refuse_adapters(model)
    refuse_copied(model)
    keep_differentiable(model)
    modules, shared = dict(model.named_modules()), shared_weights(model)
    found = {
        name: _expect_target(model, modules.get(name) or find_expert(model, name), name, selection, shared)
        for name in selection.block_indices
    }
    refuse_unfitting(found, selection.grids)
    for name in (name for name, linear in found.items() if is_tensor_parallel(linear)):
        style_of(model, name)
    return found


def _expect_target(
    model: nn.Module, linear: nn.Module | ExpertMatrix | None, name: str, selection: BlockSelection, shared: set[int]
) -> Target:
    grid = selection.grids[name]
    weight = linear.stack if isinstance(linear, ExpertMatrix) else getattr(linear, "weight", None)
    if linear is None:
        found = "no such module"
    elif id(weight) in shared and not is_embedding(linear):
        found = "one whose weight is shared with another module"
    elif isinstance(linear, ExpertMatrix):
        if (linear.weight_shape, linear.is_transposed) == (grid.weight_shape, grid.transposed):
            return linear
        found = f"an expert's matrix of {'x'.join(map(str, linear.weight.shape))}"
    elif not (is_linear(linear) or is_convolution(linear) or is_embedding(linear)) or not fits_grid(linear, grid):
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


def base_dtype(model: nn.Module, linears: Mapping[str, Target]) -> torch.dtype:
    """Return the dtype of the weights that hold blocks; for quantised weights, the dtype in which they multiply."""
    first = next(iter(linears.values()))
    if isinstance(first, ExpertMatrix) or not is_quantised(first):
        return first.weight.dtype
    return getattr(first, "compute_dtype", None) or floating_dtype(model)
