"""Decide by a weight's name which keywords of `target_modules` select it.

'attention' selects the linears of attention modules, 'qkv' only their query, key and value projections. 'experts'
selects routed experts; 'mlp' these and all other weights of a layer that transform the features of each token, shared
experts included. State-space, recurrent and convolutional mixers belong to neither 'attention' nor 'mlp', but
'all-linear' includes them. No keyword selects routers and other linears that steer with one number per token, head or
expert. Names can select any module.

`tests/contracts/families.md` shows the result for each family of models.
"""

from __future__ import annotations

from collections.abc import Collection

from smt_trainer.model.names import expert_index, layer_index, lies_in, matches

GROUPS = ("qkv", "attention", "mlp", "experts")
# The keywords that select linears and experts; 'all-conv' selects convolutions (`targets.py`).
LINEAR_KEYWORDS = (*GROUPS, "all-linear")

# Names of the query, key and value projections, separate or fused, in transformers' architectures.
QKV_NAMES = frozenset(
    "q_proj k_proj v_proj query key value query_proj key_proj value_proj q_lin k_lin v_lin q k v "
    "linear_q linear_k linear_v to_q to_k to_v to_kv Wq Wk Wv query_global key_global value_global kv_proj "
    "qkv qkv_proj query_key_value Wqkv W_pack wqkv c_attn q_attn att_proj in_proj in_proj_qkv in_proj_qkvz qkv_linear "
    "q_a_proj q_b_proj q_gate_proj kv_a_proj_with_mqa kv_b_proj q_head k_head v_head query_key "
    "project_q project_k project_v projection_query projection_key projection_value "
    "to_query to_key w2e_query e2w_query e2e_query".split()
)
# Attention projections, whatever the module around them: in Nemotron-H and RecurrentGemma all mixers have one name.
ATTENTION_NAMES = frozenset("q_proj k_proj v_proj qkv_proj o_proj".split())
# Linears with so few outputs that they would make the blocks of all other weights small, too: routers, the gates of
# gated delta nets (one output per head), attention sinks, talking heads, DeepSeek's indexer and the mixing of four
# streams in Gemma 3n and Qwen 4.
STEERING_NAMES = frozenset(
    "gate router shared_expert_gate in_proj_a in_proj_b in_proj_ba a_proj b_proj igate_preact fgate_preact "
    "indexer modality_router prediction_coefs correction_coefs sink_proj router_gate block_inject_weight "
    "head_logits_proj head_weights_proj gru_rel_pos_linear continuous_position_bias_mlp".split()
)
# Token mixers other than attention, and the side paths of Gemma 3n and of Zamba.
OTHER_NAMES = frozenset(
    "in_proj out_proj x_proj dt_proj linear_x linear_y linear_out mlstm_layer laurel per_layer_input_gate "
    "per_layer_projection altup_projections altup_unembed_projections linear".split()
)


def _is_attention(part: str) -> bool:
    """Return whether a part of a name is that of an attention module, and not of a norm beside one or a list of
    layers."""
    return "att" in part.lower() and not part.endswith(("norm", "layers"))


def in_group(name: str, group: str) -> bool:
    """Return whether a target belongs to a group: 'qkv', 'attention', 'mlp', 'experts', or a module's name or ending.
    An expert's matrix also matches by the name of its parameter or module."""
    if group in GROUPS:
        return is_meant(name, group)
    return any(matches(each, [group]) for each in with_stack(name))


def with_stack(name: str) -> list[str]:
    """Return a target's name; if it is an expert's and ends in its number, also those of its parameter and module."""
    stack, _, index = name.rpartition(".")
    return [name, stack, stack.rpartition(".")[0]] if index == str(expert_index(name)) else [name]


def is_meant(name: str, keyword: str, apart: Collection[str] = ()) -> bool:
    """Return whether a keyword selects a weight.

    Args:
        name: full name of the weight's module, or of its parameter.
        keyword: one of `LINEAR_KEYWORDS`.
        apart: modules in which no keyword selects anything.
    """
    *path, leaf = name.split(".")
    if leaf == "linear" and path and path[-1] in QKV_NAMES | ATTENTION_NAMES:
        # Moshi wraps each projection.
        leaf = path.pop()
    parts = {*path, leaf}
    if not STEERING_NAMES.isdisjoint(parts) or any(lies_in(name, module) for module in apart):
        return False
    if keyword == "all-linear":
        return True
    inside_layer = layer_index(name) >= 0
    inside_attention = inside_layer and (leaf in ATTENTION_NAMES or any(map(_is_attention, path)))
    if keyword == "qkv":
        return inside_attention and leaf in QKV_NAMES
    if keyword == "attention":
        return inside_attention
    if keyword == "experts":
        return inside_layer and any("expert" in part.lower() and "shared" not in part.lower() for part in path)
    return inside_layer and not inside_attention and OTHER_NAMES.isdisjoint(parts)
