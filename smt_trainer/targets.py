"""Which linears of a model are targets, and why the others are not."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.sharding import full_shape

logger = logging.getLogger(__name__)

# Names under which transformers' architectures keep the query, key and value projections, apart or fused.
QKV_NAMES = frozenset(
    "q_proj k_proj v_proj query key value query_proj key_proj value_proj q_lin k_lin v_lin q k v "
    "qkv qkv_proj query_key_value Wqkv W_pack wqkv c_attn att_proj in_proj "
    "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split()
)
ROUTER_NAMES = frozenset("gate router shared_expert_gate".split())
HEADED_CLASSES = ("ForSequenceClassification", "ForTokenClassification")


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, nn.Linear]:
    """The linears to choose blocks from, by full module name, in the model's own order.

    A linear that matches but cannot be tuned is left out with a warning: its weight is shared (tied), is not a
    floating-point matrix (quantised), or its `forward` is replaced on the instance (offloading hooks).

    Raises:
        SMTError: nothing matches, or nothing that matches can be tuned; the message lists the model's linears.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = set(head_names(model))
    matching = {
        name: module
        for name, module in linears.items()
        if _is_target(name, module, config.target_modules, model, heads)
        and not (config.exclude_modules and matches(name, config.exclude_modules))
        and (config.lowest_layer == 0 or layer_index(name) >= config.lowest_layer)
    }
    shared = _shared_weights(model)
    targets = {}
    for name, module in matching.items():
        reason = _why_not(module, shared)
        if reason is None:
            targets[name] = module
        else:
            logger.warning("`%s` is not tuned: %s.", name, reason)
    if not targets:
        raise SMTError(_nothing_matches(config, linears, matching))
    return targets


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def layer_index(name: str) -> int:
    """The first number in a module's path (`model.layers.7.self_attn.q_proj` -> 7); -1 outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def head_names(model: nn.Module) -> list[str]:
    """Children of a sequence or token classification model that hold its new head, such as `score`."""
    if not type(model).__name__.endswith(HEADED_CLASSES):
        return []
    base = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied weights counted once: the denominator of the papers' `#Params%`."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters())


def _is_target(
    name: str, module: nn.Linear, target_modules: str | list[str], model: nn.Module, heads: set[str]
) -> bool:
    inside_layer = layer_index(name) >= 0
    leaf = name.rpartition(".")[2]
    inside_attention = inside_layer and any("att" in part.lower() for part in name.split(".")[:-1])
    if target_modules == "qkv":
        return inside_attention and leaf in QKV_NAMES
    if target_modules == "attention":
        return inside_attention
    if target_modules == "mlp":
        return inside_layer and not inside_attention and leaf not in ROUTER_NAMES
    if target_modules == "all-linear":
        is_head = name.split(".")[0] in heads or module is _output_embeddings(model)
        return not is_head and leaf not in ROUTER_NAMES
    return matches(name, target_modules)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _shared_weights(model: nn.Module) -> set[int]:
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def _why_not(module: nn.Linear, shared: set[int]) -> str | None:
    if id(module.weight) in shared:
        return "its weight is shared with another module"
    if not module.weight.is_floating_point() or full_shape(module.weight) != (module.out_features, module.in_features):
        return f"its weight is no plain matrix of floats but {module.weight.dtype} {list(module.weight.shape)}"
    if "forward" in vars(module):
        return "its forward is replaced on the instance (a device map or an offloading hook)"
    return None


def _nothing_matches(config: SMTConfig, linears: dict[str, nn.Linear], matching: dict[str, nn.Linear]) -> str:
    if matching:
        return (
            f"target_modules={config.target_modules!r} matches {len(matching)} linears, none of which can be tuned "
            "(see the warnings above). Choose other modules, or load the model unquantised and without a device map."
        )
    shapes = Counter(
        (name.rpartition(".")[2], module.out_features, module.in_features) for name, module in linears.items()
    )
    listing = ", ".join(f"{leaf} ({count} of {out}x{into})" for (leaf, out, into), count in shapes.items())
    restrictions = "".join(
        f", {name}={value!r}"
        for name, value in (("exclude_modules", config.exclude_modules), ("lowest_layer", config.lowest_layer))
        if value
    )
    return (
        f"target_modules={config.target_modules!r}{restrictions} matches no linear of this model. Its linears are: "
        f"{listing or 'none (no torch.nn.Linear at all)'}. Name some of them in target_modules."
    )
