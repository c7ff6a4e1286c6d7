"""What the keywords of `target_modules` mean: to which group a weight belongs, by its name.

'attention' is what lies in an attention, 'qkv' its query, key and value projections. 'experts' is what a router chooses
from, 'mlp' that and every other weight of a layer that transforms the features of each token, shared experts included.
State-space, recurrent and convolutional mixers are neither; 'all-linear' has them, too. No keyword means a router or
what else steers with a number for a token, a head or an expert. Names reach everything.

`tests/contracts/families.md` shows what this makes of each family of models.
"""

from __future__ import annotations

from collections.abc import Collection

from smt_trainer.model.names import expert_index, layer_index, lies_in, matches

GROUPS = ("qkv", "attention", "mlp", "experts")
# The keywords that mean linears and experts; 'all-conv' means convolutions (`targets.py`).
LINEAR_KEYWORDS = (*GROUPS, "all-linear")

# Names of the query, key and value projections, separate or fused, in transformers' architectures.
QKV_NAMES = frozenset(
    "q_proj k_proj v_proj query key value query_proj key_proj value_proj q_lin k_lin v_lin q k v "
    "linear_q linear_k linear_v to_q to_k to_v to_kv Wq Wk Wv query_global key_global value_global kv_proj "
    "qkv qkv_proj query_key_value Wqkv W_pack wqkv c_attn q_attn att_proj in_proj in_proj_qkv in_proj_qkvz qkv_linear "
    "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split()
)
# Names that mean an attention wherever they are: in Nemotron-H and RecurrentGemma all mixers have the same name.
ATTENTION_NAMES = frozenset("q_proj k_proj v_proj qkv_proj o_proj".split())
# Their few outputs would also make the blocks of all other weights small: routers, the gates of gated delta nets (one
# output for each head), DeepSeek's indexer and Gemma 3n's mixing of its four streams.
STEERING_NAMES = frozenset(
    "gate router shared_expert_gate in_proj_a in_proj_b in_proj_ba a_proj b_proj igate_preact fgate_preact "
    "indexer modality_router prediction_coefs correction_coefs".split()
)
# Mixers of tokens that are no attention, and the side paths of Gemma 3n and of Zamba.
OTHER_NAMES = frozenset(
    "in_proj out_proj x_proj dt_proj linear_x linear_y linear_out mlstm_layer laurel per_layer_input_gate "
    "per_layer_projection altup_projections altup_unembed_projections linear".split()
)


def in_group(name: str, group: str) -> bool:
    """Return whether a target is in 'qkv', 'attention', 'mlp' or 'experts', or matches the name or ending of a module.
    An expert's matrix also has the name of its parameter, and that of its module."""
    if group in GROUPS:
        return is_meant(name, group)
    return any(matches(each, [group]) for each in with_stack(name))


def with_stack(name: str) -> list[str]:
    """Return the name of a target; for an expert's that ends in its number, also those of parameter and module."""
    stack, _, index = name.rpartition(".")
    return [name, stack, stack.rpartition(".")[0]] if index == str(expert_index(name)) else [name]


def is_meant(name: str, keyword: str, apart: Collection[str] = ()) -> bool:
    """Return whether a keyword means a weight.

    Args:
        name: full name of the weight's module, or of its parameter.
        keyword: one of `LINEAR_KEYWORDS`.
        apart: modules of which no keyword means anything.
    """
    *path, leaf = name.split(".")
    parts = {*path, leaf}
    if not STEERING_NAMES.isdisjoint(parts) or any(lies_in(name, module) for module in apart):
        return False
    if keyword == "all-linear":
        return True
    inside_layer = layer_index(name) >= 0
    inside_attention = inside_layer and (leaf in ATTENTION_NAMES or any("att" in part.lower() for part in path))
    if keyword == "qkv":
        return inside_attention and leaf in QKV_NAMES
    if keyword == "attention":
        return inside_attention
    if keyword == "experts":
        return inside_layer and any("expert" in part.lower() and "shared" not in part.lower() for part in path)
    return inside_layer and not inside_attention and OTHER_NAMES.isdisjoint(parts)
