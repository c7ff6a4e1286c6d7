"""What the keywords mean, by name."""

import pytest

from smt_trainer.model.groups import LINEAR_KEYWORDS, in_group, is_meant

ATTENTION, QKV = {"attention", "all-linear"}, {"qkv", "attention", "all-linear"}
MLP, EXPERTS, OTHER = {"mlp", "all-linear"}, {"experts", "mlp", "all-linear"}, {"all-linear"}


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("model.layers.0.self_attn.q_proj", QKV),
        ("model.layers.0.self_attn.o_proj", ATTENTION),
        ("model.layers.0.self_attn.kv_b_proj", QKV),
        ("model.layers.0.mlp.down_proj", MLP),
        ("model.layers.0.mlp.experts.gate_up_proj.3", EXPERTS),
        ("model.layers.0.mlp.shared_experts.up_proj", MLP),
        ("model.layers.0.mlp.gate", set()),
        ("model.layers.0.mlp.shared_expert_gate", set()),
        ("lm_head", OTHER),
        # One name for all mixers: Nemotron-H, RecurrentGemma.
        ("model.layers.0.mixer.q_proj", QKV),
        ("model.layers.0.temporal_block.o_proj", ATTENTION),
        ("model.layers.0.mixer.up_proj", MLP),
        ("model.layers.0.mixer.experts.up_proj.1", EXPERTS),
        # State-space, recurrent and convolutional mixers.
        ("model.layers.0.mixer.in_proj", OTHER),
        ("model.layers.0.mamba.out_proj", OTHER),
        ("model.layers.0.mamba.x_proj", OTHER),
        ("model.layers.0.conv.in_proj", OTHER),
        ("model.layers.0.temporal_block.linear_y", OTHER),
        ("model.layers.0.self_attn.out_proj", ATTENTION),
        # Gated delta nets.
        ("model.layers.0.linear_attn.in_proj_qkvz", QKV),
        ("model.layers.0.linear_attn.in_proj_z", ATTENTION),
        ("model.layers.0.linear_attn.out_proj", ATTENTION),
        ("model.layers.0.linear_attn.in_proj_ba", set()),
        ("model.layers.0.linear_attn.in_proj_a", set()),
        # Gemma 3n.
        ("model.layers.0.laurel.linear_left", OTHER),
        ("model.layers.0.per_layer_input_gate", OTHER),
        ("model.altup_projections.0", OTHER),
        ("model.layers.0.altup.prediction_coefs", set()),
        # Moshi's wrapped projections, and names that only look like attention's.
        ("model.layers.0.self_attn.q_proj.linear", QKV),
        ("model.layers.0.self_attn.o_proj.linear", ATTENTION),
        ("model.gated_cross_attn_layers.0.mlp.up_proj", MLP),
        ("model.layers.0.post_attention_layernorm.mlp.fc1", MLP),
        # Numbers for each head.
        ("model.layers.0.self_attn.sink_proj", set()),
        ("encoder.layers.0.attention.gru_rel_pos_linear", set()),
        # DeepSeek's choice of tokens.
        ("model.layers.0.self_attn.indexer.wq_b", set()),
    ],
)
def test_a_keyword_means_a_weight(name, keywords):
    assert {keyword for keyword in LINEAR_KEYWORDS if is_meant(name, keyword)} == keywords


def test_nothing_is_meant_apart():
    assert is_meant("visual.blocks.0.attn.qkv", "qkv")
    assert not any(is_meant("visual.blocks.0.attn.qkv", keyword, {"visual"}) for keyword in LINEAR_KEYWORDS)
    assert is_meant("visual.blocks.0.attn.qkv", "qkv", {"visual.blocks.0.at", "vis"})


def test_a_group_of_a_budget_is_a_keyword_or_the_end_of_a_name():
    name = "model.layers.0.mlp.experts.gate_up_proj.3"
    for group in ("experts", "mlp", "gate_up_proj", "gate_up_proj.3", "mlp.experts"):
        assert in_group(name, group)
    for group in ("attention", "qkv", "up_proj", "gate_up_proj.2"):
        assert not in_group(name, group)
