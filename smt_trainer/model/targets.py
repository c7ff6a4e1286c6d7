"""Find the weights of a model that are targets, and say why the others are not.

A target is a linear, a convolution or the matrix of one expert. A linear is an `nn.Linear` with weight W [O, I], or
GPT-2's `Conv1D`, which stores W^T [I, O]. It computes just x W^T + b, since the rewritten linear does; a subclass with
a `forward` of its own may compute something else. The same holds for convolutions (`convolution.py`). The matrices of
experts lie together in 3-D parameters (`experts.py`). Of the keywords only 'all-conv' means convolutions; names and
patterns mean all.

A weight with `requires_grad=False` is frozen on purpose and no target, even if `target_modules` names it. Only where
all parameters are frozen, as PEFT leaves a model after merging, this says nothing, and the targets are tuned. Nor does
it say anything of a weight that bitsandbytes has quantised, which cannot require a gradient.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from smt_trainer.arrays import WEIGHTS
from smt_trainer.config import TARGET_KEYWORDS, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import (
    as_convolution,
    has_plain_forward,
    is_convolution,
    is_transposed_convolution,
    matrix_shape,
)
from smt_trainer.model.experts import ExpertMatrix, expert_stacks, is_known, matrices_of
from smt_trainer.model.grid import BlockGrid, make_grids
from smt_trainer.model.names import by_projection, expert_index, layer_index, matches, plain_name
from smt_trainer.model.quantised import is_quantised
from smt_trainer.model.sharded import full_shape

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D
    from typing_extensions import TypeIs

    from smt_trainer.model.convolution import Convolution

    Linear = nn.Linear | Conv1D | Convolution
    Target = Linear | ExpertMatrix

logger = logging.getLogger(__name__)

# Names of the query, key and value projections, separate or fused, in transformers' architectures.
QKV_NAMES = frozenset(
    "q_proj k_proj v_proj query key value query_proj key_proj value_proj q_lin k_lin v_lin q k v "
    "linear_q linear_k linear_v to_q to_k to_v to_kv Wq Wk Wv query_global key_global value_global kv_proj "
    "qkv qkv_proj query_key_value Wqkv W_pack wqkv c_attn q_attn att_proj in_proj in_proj_qkv in_proj_qkvz qkv_linear "
    "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split()
)
ROUTER_NAMES = frozenset("gate router shared_expert_gate".split())
GROUPS = ("qkv", "attention", "mlp", "experts")
ALL_CONVOLUTIONS = "all-conv"
HEADED_CLASSES = ("ForSequenceClassification", "ForTokenClassification")
CONV1D = ("transformers.pytorch_utils", "Conv1D")
# The forwards that compute x W^T + b and nothing else.
LINEAR_FORWARDS = {
    ("torch.nn.modules.linear", "Linear.forward"),
    ("transformers.pytorch_utils", "Conv1D.forward"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear.forward"),
}
WEIGHT_DTYPES = tuple(getattr(torch, name) for name in WEIGHTS)
HOW_TO_LOAD = "load it unquantised, or quantised by bitsandbytes (BitsAndBytesConfig)"


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, Target]:
    """Find the weights to choose blocks from, by full name, in the model's order.

    Leave out, with a warning, a matching weight that cannot be tuned: it is frozen, shared (tied) or neither a plain
    matrix of floats nor quantised by bitsandbytes, or the `forward` of its module is its own, is replaced on the
    instance (offloading hooks) or is never called; or it is that of a transposed convolution. Also warn about linears
    of other kinds.

    Raises:
        SMTError: the model holds PEFT adapters or compiled modules, nothing matches (the message lists the model's
            linears), or no match can be tuned.
    """
    refuse_adapters(model)
    refuse_wrappers(model)
    everything = named_targets(model)
    heads = _heads(model)
    matching = _matching(model, everything, config, heads)
    shared = _shared_weights(model)
    reasons = {name: _why_not(target, shared) for name, target in matching.items()}
    targets = {name: target for name, target in matching.items() if reasons[name] is None}
    for reason, count in Counter(reason for reason in reasons.values() if reason is not None).items():
        first = next(name for name in reasons if reasons[name] == reason)
        many = "is" if count == 1 else f"and {count - 1} more are"
        logger.warning("`%s` %s not tuned: %s.", first, many, reason)
    packed = _packed_linears(model, config, heads)
    if packed:
        logger.warning("%s", _about_packed(packed))
    frozen = frozen_names(model, targets)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning("All parameters of the model are frozen (requires_grad=False). It is tuned as if none was.")
    if frozen:
        logger.warning("%s", _about_frozen(frozen, len(targets)))
        targets = {name: module for name, module in targets.items() if name not in frozen}
    if not targets:
        raise SMTError(_nothing_matches(config, everything, {**matching, **packed}))
    return targets


def target_grids(targets: Mapping[str, Target], config: SMTConfig) -> dict[str, BlockGrid]:
    """Make one grid per target from the config's `granularity` and `block_size`, transposed where the weight is.

    Raises:
        SMTError: as in `make_grids`.
    """
    grids = make_grids({name: weight_shape(target) for name, target in targets.items()}, config)
    return {name: _as_stored(grid, targets[name], config) for name, grid in grids.items()}


def _as_stored(grid: BlockGrid, target: Target, config: SMTConfig) -> BlockGrid:
    if is_convolution(target):
        return as_convolution(grid, target, config.granularity)
    return replace(grid, transposed=stores_transpose(target))


def refuse_adapters(model: nn.Module) -> None:
    """Raise `SMTError` if PEFT wraps a model or any of its modules."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise SMTError(
                f"{f'`{name}`' if name else 'the model'} is a PEFT {type(module).__name__}; blocks can be trained "
                "only in plain weights. Merge the adapter with model = model.merge_and_unload() or drop it with "
                "model.unload() first, or pass the base model as loaded."
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise `SMTError` if torch.compile or activation checkpointing wraps a model or any of its modules."""
    for name, _ in model.named_modules():
        if plain_name(f"{name}.") != f"{name}.":
            raise SMTError(
                f"`{name}` is inside a wrapper of torch.compile or activation checkpointing, whose name no checkpoint "
                "has. Pass the model as loaded, and let Trainer wrap it: TrainingArguments(torch_compile=True) or "
                "(gradient_checkpointing=True)."
            )


def frozen_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Keep the names of the targets whose weight is frozen, unless all of the model is."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    targets = named_targets(model)
    return [name for name in names if name in targets and _is_frozen(targets[name])]


def _is_frozen(target: Target) -> bool:
    if isinstance(target, ExpertMatrix):
        return not target.stack.requires_grad
    return not target.weight.requires_grad and not is_quantised(target)


def named_targets(model: nn.Module) -> dict[str, Target]:
    """Return all linears, convolutions and matrices of experts of a model by full name, in the model's order."""
    found: dict[str, Target] = {}
    stacks: dict[nn.Module, list[tuple[str, str]]] = {}
    for name, module, leaf in expert_stacks(model):
        stacks.setdefault(module, []).append((name, leaf))
    for name, module in model.named_modules():
        if is_linear(module) or is_convolution(module):
            found[name] = module
        for stack, leaf in stacks.get(module, ()):
            found |= matrices_of(stack, module, leaf)
    return found


def named_linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return all linears of a model by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def named_layers(model: nn.Module) -> dict[str, Linear]:
    """Return all linears and convolutions of a model by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module) or is_convolution(module)}


def is_linear(module: nn.Module) -> TypeIs[nn.Linear | Conv1D]:
    """Return whether a module is an `nn.Linear` or a `Conv1D`."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_layer_of(target: nn.Module | ExpertMatrix, grid: BlockGrid) -> bool:
    """Return whether a grid may be that of a target: whether it is stored so, and a convolution moves so."""
    if isinstance(target, ExpertMatrix):
        return not grid.kernel and target.is_transposed == grid.transposed
    if is_convolution(target):
        return (tuple(target.kernel_size), target.groups) == (grid.kernel, grid.groups)
    return is_linear(target) and not grid.kernel and is_transposed(target) == grid.transposed


def kind_of(grid: BlockGrid) -> str:
    """Return what a grid cuts the weight of, for a message."""
    if grid.kernel:
        return f"convolution of {grid.groups} groups" if grid.groups > 1 else "convolution"
    return "Conv1D" if grid.transposed else "linear"


def is_transposed(module: nn.Module) -> TypeIs[Conv1D]:
    """Return whether a module is a `Conv1D`; compare names, since importing transformers takes seconds."""
    return _is_conv1d(type(module))


def _is_conv1d(kind: type) -> bool:
    return any((base.__module__, base.__name__) == CONV1D for base in kind.__mro__)


def stores_transpose(target: Target) -> bool:
    """Return whether a target's parameter holds W^T [I, O]."""
    return target.is_transposed if isinstance(target, ExpertMatrix) else is_transposed(target)


def has_linear_forward(linear: nn.Module) -> bool:
    """Return whether the class of a linear computes x W^T + b; its `forward` may be inherited, but not its own."""
    if is_convolution(linear):
        return has_plain_forward(linear)
    forward = type(linear).forward
    return (forward.__module__, forward.__qualname__) in LINEAR_FORWARDS


def has_plain_weight(linear: Linear) -> bool:
    """Return whether a linear's weight is a matrix of floats: not quantised, packed, computed or a DTensor."""
    shape, weight = weight_shape(linear), linear.weight
    if is_transposed(linear):
        shape = shape[::-1]
    elif is_convolution(linear):
        shape = (shape[0], linear.in_channels // linear.groups, *linear.kernel_size)
    return type(weight) is nn.Parameter and weight.dtype in WEIGHT_DTYPES and full_shape(weight) == shape


def narrow(names: Iterable[str], config: SMTConfig) -> list[str]:
    """Keep the names of targets that this configuration also asks for."""
    return [name for name in names if _is_wanted(_with_stack(name), config, heads=set())]


def in_group(name: str, group: str) -> bool:
    """Return whether a target is in 'qkv', 'attention', 'mlp' or 'experts', or matches the name or ending of a module.
    An expert's matrix also has the name of its parameter, and that of its module."""
    if group in GROUPS:
        return _is_target(name, group, heads=set())
    return any(matches(each, [group]) for each in _with_stack(name))


def head_names(model: nn.Module) -> list[str]:
    """Name the children of a sequence or token classification model that hold its new head, such as `score`."""
    if not type(model).__name__.endswith(HEADED_CLASSES):
        return []
    base = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied weights once: the denominator of the papers' `#Params%`."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters())


def weight_shape(target: Target) -> tuple[int, int]:
    """Return (O, I) of a target's weight W; of a convolution's as a matrix (O, K)."""
    if isinstance(target, ExpertMatrix):
        return target.weight_shape
    if is_convolution(target):
        return matrix_shape(target)
    return (target.nf, target.nx) if is_transposed(target) else (target.out_features, target.in_features)


def _names_of(name: str, target: Target) -> list[str]:
    """Return the names by which a configuration may ask for a target."""
    return _with_stack(name) if isinstance(target, ExpertMatrix) else [name]


def _with_stack(name: str) -> list[str]:
    """Return the name of a target; for an expert's that ends in its number, also those of parameter and module."""
    stack, _, index = name.rpartition(".")
    return [name, stack, stack.rpartition(".")[0]] if index == str(expert_index(name)) else [name]


def _heads(model: nn.Module) -> set[str]:
    """Name the modules that 'all-linear' leaves out: the output embeddings and a classification head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {*head_names(model), *(name for name, module in model.named_modules() if module is output)}


def _is_wanted(names: list[str], config: SMTConfig, heads: set[str]) -> bool:
    """Return whether the configuration asks for a module with any of these names."""
    return (
        any(_is_target(name, config.target_modules, heads) for name in names)
        and not (config.exclude_modules and any(matches(name, config.exclude_modules) for name in names))
        and (config.lowest_layer == 0 or layer_index(names[0]) >= config.lowest_layer)
    )


def _matching(
    model: nn.Module, everything: Mapping[str, Target], config: SMTConfig, heads: set[str]
) -> dict[str, Target]:
    """Return the targets, and the transposed convolutions, that the configuration asks for."""
    of_convolutions = None if config.target_modules in TARGET_KEYWORDS else config
    if config.target_modules == ALL_CONVOLUTIONS:
        of_convolutions = replace(config, target_modules="all-linear")
    transposed: dict[str, Any] = {
        name: module for name, module in model.named_modules() if is_transposed_convolution(module)
    }
    found = {}
    for name, target in (*everything.items(), *transposed.items()):
        asked = of_convolutions if name in transposed or is_convolution(target) else config
        if asked is not None and _is_wanted(_names_of(name, target), asked, heads):
            found[name] = target
    return found


def _is_target(name: str, target_modules: str | list[str], heads: set[str]) -> bool:
    *path, leaf = name.split(".")
    inside_layer = layer_index(name) >= 0
    inside_attention = inside_layer and any("att" in part.lower() for part in path)
    is_router = not ROUTER_NAMES.isdisjoint([*path, leaf])
    inside_experts = any("expert" in part.lower() and "shared" not in part.lower() for part in path)
    if target_modules == "qkv":
        return inside_attention and leaf in QKV_NAMES
    if target_modules == "attention":
        return inside_attention
    if target_modules == "mlp":
        return inside_layer and not inside_attention and not is_router
    if target_modules == "experts":
        return inside_layer and inside_experts and not is_router
    if target_modules == "all-linear":
        return not is_router and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    return matches(name, target_modules)


def _shared_weights(model: nn.Module) -> set[int]:
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def _why_not(target: Target, shared: set[int]) -> str | None:
    return _why_no_expert(target, shared) if isinstance(target, ExpertMatrix) else _why_no_linear(target, shared)


def _why_no_expert(matrix: ExpertMatrix, shared: set[int]) -> str | None:
    experts, stack = matrix.experts, matrix.stack
    if id(stack) in shared:
        return "its parameter is shared with another module"
    if type(stack) is not nn.Parameter or stack.dtype not in WEIGHT_DTYPES:
        return f"its parameter is not a plain tensor of floats but a {type(stack).__name__} of {stack.dtype}"
    if not is_known(experts):
        return f"it is not known which way round a {type(experts).__name__} keeps the matrices of its experts"
    if "forward" in vars(experts):
        return "the forward of its module is replaced on the instance (a device map or an offloading hook)"
    return None


def _why_no_linear(linear: Linear, shared: set[int]) -> str | None:
    weight = linear.weight
    if is_transposed_convolution(linear):
        return f"it is a {type(linear).__name__}, and the rows of its weight compute no output channel"
    if id(weight) in shared:
        return "its weight is shared with another module"
    if is_quantised(linear):
        if _is_conv1d(getattr(linear, "source_cls", nn.Linear)):
            return "it was a Conv1D, and its weight was transposed when it was quantised"
    elif not has_plain_weight(linear):
        return (
            f"its weight is not a plain matrix of floats but a {type(weight).__name__} of {weight.dtype}; {HOW_TO_LOAD}"
        )
    elif not has_linear_forward(linear):
        return f"its class, {type(linear).__name__}, has a forward of its own, which the rewritten linear would replace"
    if "forward" in vars(linear):
        return "its forward is replaced on the instance (a device map or an offloading hook)"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    return None


def _about_frozen(frozen: Collection[str], count: int) -> str:
    return (
        f"{len(frozen)} of {count} matching linears, such as `{next(iter(frozen))}`, are not tuned: their weights are "
        "frozen (requires_grad=False). To tune them too, call requires_grad_(True) on them first."
    )


def _packed_linears(model: nn.Module, config: SMTConfig, heads: set[str]) -> dict[str, nn.Module]:
    """Find the modules in the place of targets that are no linears but have their features: of other formats."""
    return {
        name: module
        for name, module in model.named_modules()
        if not is_linear(module)
        and all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
        and _is_wanted([name], config, heads)
    }


def _about_packed(packed: dict[str, nn.Module]) -> str:
    name, first = next(iter(packed.items()))
    return (
        f"{len(packed)} linears, such as `{name}`, are not tuned: a {type(first).__name__} has no weight that is a "
        f"plain matrix of floats; {HOW_TO_LOAD}."
    )


def _nothing_matches(config: SMTConfig, targets: Mapping[str, Target], matching: Collection[str]) -> str:
    if matching:
        return (
            f"target_modules={config.target_modules!r} matches {len(matching)} linears, none of which can be tuned "
            "(see the warnings above). Choose other modules, unfreeze them, or load the model without a device map, "
            "and unquantised or quantised by bitsandbytes."
        )
    shapes = Counter((*by_projection([name]), *weight_shape(target)) for name, target in targets.items())
    listing = ", ".join(f"{leaf} ({count} of {out}x{into})" for (leaf, out, into), count in shapes.items())
    restrictions = "".join(
        f", {name}={value!r}"
        for name, value in (("exclude_modules", config.exclude_modules), ("lowest_layer", config.lowest_layer))
        if value
    )
    return (
        f"target_modules={config.target_modules!r}{restrictions} matches no linear of this model. Its linears and "
        f"convolutions are: {listing or 'none (neither torch.nn.Linear nor Conv1D)'}. Name some of them in "
        "target_modules."
    )
