"""Model families in tiny sizes, with inputs to train each on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers
from architectures import BART, DEEPSEEK, EXPERTS, GROUPED
from torch import Tensor, nn

IMAGE_TOKEN = 5
LOCAL = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
# Two heads of a state-space model: 128 = 2 x 64 channels.
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "num_key_value_heads": 2,
}
SHORT = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VIT = VIT | {"image_size": 8, "patch_size": 4}
TEXT = tiny.SIZES | {"num_key_value_heads": 2}
ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def of_text(model: nn.Module) -> dict[str, Tensor]:
    """Four sequences, one of them shorter than the others."""
    batch, mask = tiny.batch(), torch.ones(4, tiny.LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "labels": batch["labels"].masked_fill(mask == 0, -100),
    }


def of_images(model: nn.Module) -> dict[str, Tensor]:
    """Four images of 8 x 8 in three classes."""
    return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}


def of_sentences(model: nn.Module) -> dict[str, Tensor]:
    """Four sequences in three classes."""
    return {"input_ids": tiny.tokens(4), "labels": torch.arange(4) % 3}


def of_sound(model: nn.Module) -> dict[str, Tensor]:
    """Four spectrograms and their transcripts."""
    return {"input_features": torch.randn(4, 8, 12), "labels": tiny.tokens(4)}


def of_pairs(model: nn.Module) -> dict[str, Any]:
    """Four images and their captions."""
    return {"input_ids": tiny.tokens(4), "pixel_values": torch.randn(4, 3, 8, 8), "return_loss": True}


def with_image(count: int, *, nested: bool = False) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Two sequences, each with an image of 8 x 8 that takes the place of `count` tokens."""

    def make(model: nn.Module) -> dict[str, Tensor]:
        batch = _with_placeholders(count)
        images = torch.randn(2, 3, 8, 8)
        return batch | {"pixel_values": images[:, None] if nested else images}

    return make


def with_types(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences with images, and a mask of the image tokens."""
    batch = with_image(4)(model)
    return batch | {"token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def with_patches(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences with images of 4 x 4 patches, each 2 x 2 of which become a token."""
    vision = model.config.vision_config
    size = vision.patch_size**2 * vision.temporal_patch_size * 3
    batch = _with_placeholders(4)
    return batch | {
        "pixel_values": torch.randn(2 * 16, size),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int(),
    }


def _with_placeholders(count: int) -> dict[str, Tensor]:
    rows = tiny.tokens(2).clone()
    rows[rows == IMAGE_TOKEN] = IMAGE_TOKEN + 1
    rows[:, 1 : 1 + count] = IMAGE_TOKEN
    return {"input_ids": rows, "labels": rows.masked_fill(rows == IMAGE_TOKEN, -100)}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: name of a class of transformers.
        overrides: fields that override `tiny.SIZES`; a composite configuration gets only these.
        inputs: makes one batch.
        is_composite: whether the configuration has one part for text and one for images.
        read: projections whose weight forward reads without calling them, so that none of their blocks can be trained.
    """

    architecture: str
    overrides: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], dict[str, Any]] = of_text
    is_composite: bool = False
    read: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Build the model from a fixed seed."""
        if not self.is_composite:
            return tiny.build(self.architecture, **self.overrides)
        kind = getattr(transformers, self.architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(kind.config_class(**self.overrides)).eval()


def vlm(architecture: str, text: dict, vision: dict, inputs: Callable, **overrides) -> Family:
    """Describe a model of images and text."""
    parts = {"text_config": TEXT | text, "vision_config": vision}
    return Family(architecture, parts | {"image_token_id": IMAGE_TOKEN} | overrides, inputs, is_composite=True)


QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
FAMILIES = {
    "Llama": Family("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "Qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "Qwen3": Family("Qwen3ForCausalLM", GROUPED),
    "HRM-Text": Family("HrmTextForCausalLM", GROUPED),
    "SmolLM3": Family("SmolLM3ForCausalLM", GROUPED),
    "Phi-3, Phi-4": Family("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    "Cohere2": Family("Cohere2ForCausalLM", GROUPED),
    "Gemma 2": Family("Gemma2ForCausalLM", GROUPED),
    "Gemma 3": Family("Gemma3ForCausalLM", GROUPED),
    "Gemma 3n": Family(
        "Gemma3nForCausalLM",
        GROUPED
        | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "laurel_rank": 16}
        | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    ),
    "Mixtral": Family("MixtralForCausalLM", LOCAL),
    "OLMoE": Family("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", GROUPED | EXPERTS | {"num_experts": 4}),
    "gpt-oss": Family("GptOssForCausalLM", LOCAL),
    "Llama 4": Family("Llama4ForCausalLM", LOCAL | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}),
    "DeepSeek-V2": Family("DeepseekV2ForCausalLM", DEEPSEEK),
    "DeepSeek-V3": Family("DeepseekV3ForCausalLM", DEEPSEEK),
    "GLM-4.5": Family("Glm4MoeForCausalLM", GROUPED | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "Qwen3-Next": Family("Qwen3NextForCausalLM", GROUPED | DELTA_NET | SHARED),
    "Qwen3.5": Family("Qwen3_5ForCausalLM", GROUPED | DELTA_NET),
    "Qwen3.5-MoE": Family("Qwen3_5MoeForCausalLM", GROUPED | DELTA_NET | SHARED),
    "Mamba": Family("MambaForCausalLM", {"state_size": 8, "time_step_rank": 16}, read=("dt_proj",)),
    "Mamba-2": Family(
        "Mamba2ForCausalLM", {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
    ),
    "Falcon-Mamba": Family("FalconMambaForCausalLM", {"state_size": 8, "time_step_rank": 16}, read=("dt_proj",)),
    "Falcon-H1": Family("FalconH1ForCausalLM", STATE_SPACE | {"mamba_d_ssm": 128}),
    "Bamba": Family("BambaForCausalLM", STATE_SPACE | {"attn_layer_indices": [1]}),
    "Granite 4 hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        STATE_SPACE | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 32},
    ),
    "Jamba": Family(
        "JambaForCausalLM",
        {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 16,
        }
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        read=("dt_proj",),
    ),
    "Nemotron-H": Family(
        "NemotronHForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16}
        | {"n_groups": 1, "chunk_size": 8, "layers_block_type": ["mamba", "moe", "attention", "mlp"]}
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
    ),
    "Zamba2": Family(
        "Zamba2ForCausalLM",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "adapter_rank": 16}
        | {"mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "chunk_size": 8},
    ),
    "LFM2": Family("Lfm2ForCausalLM", SHORT),
    "RecurrentGemma": Family("RecurrentGemmaForCausalLM", {"block_types": ["recurrent", "attention"], "lru_width": 64}),
    "BART": Family("BartForConditionalGeneration", BART),
    "T5": Family(
        "T5ForConditionalGeneration",
        {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 2, "decoder_start_token_id": 1},
    ),
    "BERT": Family("BertForSequenceClassification", {"num_labels": 3}, of_sentences),
    "ModernBERT": Family("ModernBertForSequenceClassification", {"num_labels": 3}, of_sentences),
    "DeBERTa": Family("DebertaV2ForSequenceClassification", {"num_labels": 3}, of_sentences),
    "ViT": Family("ViTForImageClassification", {"image_size": 8, "patch_size": 4, "num_labels": 16}, of_images),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        BART | {"num_mel_bins": 8, "max_source_positions": 6, "decoder_start_token_id": 1},
        of_sound,
    ),
    "CLIP": Family(
        "CLIPModel",
        {"text_config": TEXT, "vision_config": SMALL_VIT, "projection_dim": 32},
        of_pairs,
        is_composite=True,
    ),
    "LLaVA": vlm(
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        SMALL_VIT | {"model_type": "clip_vision_model"},
        with_image(4),
        image_token_index=IMAGE_TOKEN,
    ),
    "PaliGemma": vlm(
        "PaliGemmaForConditionalGeneration",
        GROUPED | {"model_type": "gemma"},
        SMALL_VIT | {"model_type": "siglip_vision_model", "projection_dim": 64},
        with_types,
        projection_dim=64,
    ),
    "Gemma 3 with images": vlm("Gemma3ForConditionalGeneration", GROUPED, SMALL_VIT, with_types, mm_tokens_per_image=4),
    "Idefics3": vlm(
        "Idefics3ForConditionalGeneration",
        {"model_type": "llama"},
        SMALL_VIT,
        with_image(1, nested=True),
        scale_factor=2,
    ),
    "SmolVLM": vlm(
        "SmolVLMForConditionalGeneration",
        {"model_type": "llama"},
        SMALL_VIT,
        with_image(1, nested=True),
        scale_factor=2,
    ),
    "Qwen2-VL": vlm(
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": ROTATED},
        QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
        with_patches,
    ),
    "Qwen2.5-VL": vlm(
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": ROTATED},
        QWEN_VISION
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        with_patches,
    ),
    "Qwen3-VL": vlm(
        "Qwen3VLForConditionalGeneration",
        GROUPED | {"rope_parameters": ROTATED},
        QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        with_patches,
    ),
    "Qwen3-VL-MoE": vlm(
        "Qwen3VLMoeForConditionalGeneration",
        GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "rope_parameters": ROTATED},
        QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        with_patches,
    ),
    "Qwen3.5 with images": vlm(
        "Qwen3_5ForConditionalGeneration",
        GROUPED | DELTA_NET | {"rope_parameters": ROTATED | {"partial_rotary_factor": 1.0}},
        QWEN3_VISION,
        with_patches,
    ),
}
SKIPPED = {
    "Gemma 3n with images": "its vision tower comes from timm, which is not installed; its text model is above",
    "Phi-4 multimodal": "its text model is that of Phi-4 above, and its towers are left alone "
    "(`tests/model/test_language_model.py`)",
}
