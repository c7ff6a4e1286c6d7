"""Architectures of transformers in tiny sizes, and the projections to expect in each."""

import tiny
import torch

SEPARATE, FUSED = ["q_proj", "k_proj", "v_proj"], ["query_key_value"]
COMPRESSED = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = (
    EXPERTS
    | LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
)
BART = {
    f"{side}_{part}": size
    for side in ("encoder", "decoder")
    for part, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()
} | {"d_model": 64, "decoder_start_token_id": 1}
ARCHITECTURES = {
    "LlamaForCausalLM": ({"num_key_value_heads": 2}, SEPARATE),
    "Qwen2ForCausalLM": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, SEPARATE),
    "MistralForCausalLM": ({"num_key_value_heads": 2}, SEPARATE),
    "GemmaForCausalLM": ({"num_key_value_heads": 1, "head_dim": 16}, SEPARATE),
    "OPTForCausalLM": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, ["k_proj", "v_proj", "q_proj"]),
    "PhiForCausalLM": ({}, SEPARATE),
    "GPTNeoXForCausalLM": ({}, FUSED),
    "FalconForCausalLM": ({}, FUSED),
    "Phi3ForCausalLM": ({"num_key_value_heads": 2}, ["qkv_proj"]),
    "Qwen3ForCausalLM": (GROUPED, SEPARATE),
    "Gemma3ForCausalLM": (GROUPED, SEPARATE),
    "CohereForCausalLM": (GROUPED, SEPARATE),
    "Olmo2ForCausalLM": (GROUPED, SEPARATE),
    "Starcoder2ForCausalLM": (GROUPED, SEPARATE),
    "SmolLM3ForCausalLM": (GROUPED, SEPARATE),
    "GPT2LMHeadModel": ({}, ["c_attn"]),
    "GPTJForCausalLM": ({"rotary_dim": 8}, ["k_proj", "v_proj", "q_proj"]),
    "CodeGenForCausalLM": ({"rotary_dim": 8}, ["qkv_proj"]),
    "BloomForCausalLM": ({}, FUSED),
    "MptForCausalLM": ({}, ["Wqkv"]),
    "MixtralForCausalLM": (GROUPED | {"num_local_experts": 4}, SEPARATE),
    "Qwen3MoeForCausalLM": (GROUPED | EXPERTS | {"num_experts": 4}, SEPARATE),
    "GptOssForCausalLM": (GROUPED | {"num_local_experts": 4}, SEPARATE),
    "DeepseekV2ForCausalLM": (DEEPSEEK, COMPRESSED),
    "DeepseekV3ForCausalLM": (DEEPSEEK, COMPRESSED),
    "BartForConditionalGeneration": (BART, ["k_proj", "v_proj", "q_proj"]),
    "T5ForConditionalGeneration": (
        {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 2, "decoder_start_token_id": 1},
        ["q", "k", "v"],
    ),
    "WhisperForConditionalGeneration": (
        BART | {"num_mel_bins": 8, "max_source_positions": 6, "decoder_start_token_id": 1},
        ["k_proj", "v_proj", "q_proj"],
    ),
    "BertForSequenceClassification": ({"num_labels": 3}, ["query", "key", "value"]),
    "AlbertForSequenceClassification": ({"num_labels": 3, "embedding_size": 32}, ["query", "key", "value"]),
    "DebertaV2ForSequenceClassification": ({"num_labels": 3}, ["query_proj", "key_proj", "value_proj"]),
    "DistilBertForSequenceClassification": ({"num_labels": 3, "hidden_dim": 96}, ["q_lin", "k_lin", "v_lin"]),
    "Wav2Vec2ForSequenceClassification": (
        {"num_labels": 3, "conv_dim": [32], "conv_kernel": [4], "conv_stride": [4], "num_feat_extract_layers": 1}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0},
        ["k_proj", "v_proj", "q_proj"],
    ),
    # ViT's names differ between releases of transformers.
    "ViTForImageClassification": ({"image_size": 8, "patch_size": 4, "num_labels": 3}, None),
}
# Number of attentions, if it is not one in each of the two layers: cross-attention adds some, shared layers save some.
ATTENTIONS = {
    "BartForConditionalGeneration": 6,
    "T5ForConditionalGeneration": 6,
    "WhisperForConditionalGeneration": 6,
    "AlbertForSequenceClassification": 1,
}


def inputs_of(model) -> dict[str, torch.Tensor]:
    """Make one batch that suits the model."""
    if "Whisper" in type(model).__name__:
        return {"input_features": torch.randn(4, 8, 12), "labels": tiny.tokens(4)}
    if "Classification" not in type(model).__name__:
        return tiny.batch()
    data = {"pixel_values": torch.randn(4, 3, 8, 8), "input_values": torch.randn(4, 40), "input_ids": tiny.tokens(4)}
    return {model.main_input_name: data[model.main_input_name], "labels": torch.arange(4) % 3}
