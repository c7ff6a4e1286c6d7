"""Distinguish the kinds of weights that can be targets, and how each is stored.

A linear is an `nn.Linear` with weight W [O, I], or GPT-2's `Conv1D`, which stores W^T [I, O]. To be tuned, it must
compute just x W^T + b, as the rewritten linear does; a subclass with its own `forward` may compute something else. The
same holds for convolutions (`convolution.py`) and embeddings (`embedding.py`). The matrices of experts lie together in
3-D parameters (`experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smt_trainer.arrays import FLOATS
from smt_trainer.model.convolution import has_plain_forward, is_convolution, matrix_shape
from smt_trainer.model.embedding import has_lookup_forward, is_embedding
from smt_trainer.model.experts import ExpertMatrix, expert_stacks, matrices_of
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import full_shape

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D
    from typing_extensions import TypeIs

    from smt_trainer.model.convolution import Convolution

    Linear = nn.Linear | Conv1D | Convolution
    Target = Linear | nn.Embedding | ExpertMatrix


CONV1D = ("transformers.pytorch_utils", "Conv1D")
# The forwards that compute x W^T + b and nothing else.
LINEAR_FORWARDS = {
    ("torch.nn.modules.linear", "Linear.forward"),
    ("transformers.pytorch_utils", "Conv1D.forward"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear.forward"),
}
WEIGHT_DTYPES = tuple(getattr(torch, name) for name in FLOATS)


def named_targets(model: nn.Module) -> dict[str, Target]:
    """Return all linears, convolutions, embeddings and matrices of experts of a model by full name, in its order."""
    found: dict[str, Target] = {}
    stacks: dict[nn.Module, list[tuple[str, str]]] = {}
    for name, module, leaf in expert_stacks(model):
        stacks.setdefault(module, []).append((name, leaf))
    for name, module in model.named_modules():
        if is_linear(module) or is_convolution(module) or is_embedding(module):
            found[name] = module
        for stack, leaf in stacks.get(module, ()):
            found |= matrices_of(stack, module, leaf)
    return found


def pick_targets(model: nn.Module, names: Iterable[str]) -> dict[str, Target]:
    """Return the targets of a model, wrapped or not, that have these full names."""
    targets = {plain_name(name): target for name, target in named_targets(model).items()}
    return {name: targets[name] for name in names}


def named_linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return all linears of a model by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def named_linears_and_convolutions(model: nn.Module) -> dict[str, Linear]:
    """Return all linears and convolutions of a model by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module) or is_convolution(module)}


def is_linear(module: nn.Module) -> TypeIs[nn.Linear | Conv1D]:
    """Return whether a module is an `nn.Linear` or a `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def fits_grid(target: nn.Module | ExpertMatrix, grid: BlockGrid) -> bool:
    """Return whether a grid can describe a target: same kind and layout; for a convolution, same kernel and groups."""
    if isinstance(target, ExpertMatrix):
        return not (grid.kernel or grid.embedding) and target.is_transposed == grid.transposed
    if is_convolution(target):
        return (tuple(target.kernel_size), target.groups) == (grid.kernel, grid.groups)
    if is_embedding(target) or grid.embedding:
        return is_embedding(target) and grid.embedding
    return is_linear(target) and not grid.kernel and is_conv1d(target) == grid.transposed


def kind_of(grid: BlockGrid) -> str:
    """Return the kind of module whose weight a grid cuts, with its article, for a message."""
    if grid.kernel:
        return f"a convolution of {grid.groups} groups" if grid.groups > 1 else "a convolution"
    if grid.embedding:
        return "an embedding"
    return "a Conv1D" if grid.transposed else "a linear"


def is_conv1d(module: nn.Module) -> TypeIs[Conv1D]:
    """Return whether a module is a `Conv1D`; compare names, since importing transformers takes seconds."""
    return is_conv1d_class(type(module))


def is_conv1d_class(kind: type) -> bool:
    """Return whether a class is transformers' `Conv1D`; compare names, since importing it takes seconds."""
    return any((base.__module__, base.__name__) == CONV1D for base in kind.__mro__)


def stores_transpose(target: Target) -> bool:
    """Return whether a target's parameter holds W^T [I, O]."""
    return target.is_transposed if isinstance(target, ExpertMatrix) else is_conv1d(target)


def has_linear_forward(linear: nn.Module) -> bool:
    """Return whether a module's class has, or inherits, a known `forward`: x W^T + b, a convolution or a lookup."""
    if is_convolution(linear):
        return has_plain_forward(linear)
    if is_embedding(linear):
        return has_lookup_forward(linear)
    forward = type(linear).forward
    return (forward.__module__, forward.__qualname__) in LINEAR_FORWARDS


def has_plain_weight(linear: Linear | nn.Embedding) -> bool:
    """Return whether a linear's weight is a matrix of floats: not quantised, packed, computed or a DTensor."""
    shape, weight = weight_shape(linear), linear.weight
    if is_conv1d(linear):
        shape = shape[::-1]
    elif is_convolution(linear):
        shape = (shape[0], linear.in_channels // linear.groups, *linear.kernel_size)
    return type(weight) is nn.Parameter and weight.dtype in WEIGHT_DTYPES and full_shape(weight) == shape


def parameter_of(target: Target) -> Tensor:
    """Return the parameter that holds a target's weight; for an expert's matrix, together with other experts'."""
    return target.stack if isinstance(target, ExpertMatrix) else target.weight


def weight_shape(target: Target) -> tuple[int, int]:
    """Return (O, I) of a target's weight W; for a convolution, (O, K) of its weight as a matrix."""
    if isinstance(target, ExpertMatrix):
        return target.weight_shape
    if is_convolution(target):
        return matrix_shape(target)
    if is_embedding(target):
        return target.num_embeddings, target.embedding_dim
    return (target.nf, target.nx) if is_conv1d(target) else (target.out_features, target.in_features)
