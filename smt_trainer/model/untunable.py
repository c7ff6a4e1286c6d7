"""Explain, for a warning, why a selected weight cannot be tuned."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from smt_trainer.model.convolution import is_transposed_convolution
from smt_trainer.model.embedding import has_lookup_forward, is_embedding, sharing, unusual_option
from smt_trainer.model.experts import ExpertMatrix, is_known
from smt_trainer.model.kinds import WEIGHT_DTYPES, has_linear_forward, has_plain_weight, is_conv1d_class
from smt_trainer.model.quantised import is_quantised
from smt_trainer.model.sharded import is_dtensor
from smt_trainer.model.tensor_parallel import is_tensor_parallel, why_no_slice

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Linear, Target

REPLACED = "is replaced on the instance (a device map or an offloading hook)"
HOW_TO_LOAD = "load it unquantised, or quantised by bitsandbytes (BitsAndBytesConfig)"


def shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules hold."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def why_not(model: nn.Module, target: Target, shared: set[int]) -> str | None:
    """Return why a target of a model cannot be tuned; None if it can. `shared` are the ids of shared weights."""
    if is_embedding(target):
        return why_no_embedding(model, target)
    return _why_no_expert(target, shared) if isinstance(target, ExpertMatrix) else _why_no_linear(target, shared)


def why_no_embedding(model: nn.Module, embedding: nn.Embedding) -> str | None:
    """Return why blocks of an embedding of a model cannot be trained; None if they can."""
    weight, option = embedding.weight, unusual_option(embedding)
    if option is not None:
        return f"it has {option}, which changes the weight in forward, or its gradient"
    if not has_plain_weight(embedding):
        return f"its weight is not a plain matrix of floats but a {type(weight).__name__} of {weight.dtype}"
    if not has_lookup_forward(embedding):
        return f"its class, {type(embedding).__name__}, has a forward of its own, which does more than look rows up"
    others = sharing(model, embedding)
    if any("forward" in vars(module) for module in (embedding, *others)):
        return f"its forward, or that of a tied head, {REPLACED}"
    strange = next((module for module in others if not (type(module) is nn.Linear and module.weight is weight)), None)
    if strange is not None:
        return (
            f"its weight is shared with another {type(strange).__name__}, and only an nn.Linear is known as a tied head"
        )
    return None


def _why_no_expert(matrix: ExpertMatrix, shared: set[int]) -> str | None:
    experts, stack = matrix.experts, matrix.stack
    if id(stack) in shared:
        return "its parameter is shared with another module"
    if is_dtensor(stack):
        return "its parameter is cut over ranks, and tracking experts' products is not known to be exact there"
    if type(stack) is not nn.Parameter or stack.dtype not in WEIGHT_DTYPES:
        return f"its parameter is not a plain tensor of floats but a {type(stack).__name__} of {stack.dtype}"
    if not is_known(experts):
        return f"it is not known which way round a {type(experts).__name__} keeps the matrices of its experts"
    if "forward" in vars(experts):
        return f"the forward of its module {REPLACED}"
    return None


def _why_no_linear(linear: Linear, shared: set[int]) -> str | None:
    weight = linear.weight
    if is_transposed_convolution(linear):
        return f"it is a {type(linear).__name__}, and the rows of its weight compute no output channel"
    if id(weight) in shared:
        return "its weight is shared with another module"
    if is_tensor_parallel(linear):
        return why_no_slice(linear)
    if is_quantised(linear):
        if is_conv1d_class(getattr(linear, "source_cls", nn.Linear)):
            return "it was a Conv1D, and its weight was transposed when it was quantised"
    elif not has_plain_weight(linear):
        return (
            f"its weight is not a plain matrix of floats but a {type(weight).__name__} of {weight.dtype}; {HOW_TO_LOAD}"
        )
    elif not has_linear_forward(linear):
        return f"its class, {type(linear).__name__}, has a forward of its own, which the rewritten linear would replace"
    if "forward" in vars(linear):
        return f"its forward {REPLACED}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    return None
