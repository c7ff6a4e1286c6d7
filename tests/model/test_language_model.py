"""Finding the language model in a larger model."""

import pytest
import tiny
import torch
import transformers
from families import FAMILIES, SMALL_VIT
from torch import nn

from smt_trainer import SMTConfig
from smt_trainer.model.language_model import find_language_model, find_towers, modules_beside
from smt_trainer.model.targets import find_targets


@pytest.mark.parametrize(
    ("name", "inner", "beside"),
    [
        ("LLaVA", "model.language_model", ["lm_head", "model.vision_tower", "model.multi_modal_projector"]),
        ("Idefics3", "model.text_model", ["lm_head", "model.vision_model", "model.connector"]),
        ("Qwen3-VL", "model.language_model", ["lm_head", "model.visual"]),
    ],
)
def test_a_language_model_and_what_lies_beside_it(name, inner, beside):
    model = FAMILIES[name].build()
    assert find_language_model(model) == inner
    assert sorted(modules_beside(model, inner)) == sorted(beside)
    weights = sum(parameter.numel() for parameter in model.get_submodule(inner).parameters())
    others = sum(p.numel() for module in beside for p in model.get_submodule(module).parameters())
    assert weights + others == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["Llama", "ViT", "T5", "Whisper", "CLIP"])
def test_other_models_have_none(name):
    assert find_language_model(FAMILIES[name].build()) == ""


def test_the_language_model_taken_out_is_a_whole_model():
    assert find_language_model(FAMILIES["LLaVA"].build().model.language_model) == ""


def test_a_module_of_ones_own_has_none():
    assert find_language_model(nn.Sequential(tiny.llama())) == ""


# Models whose towers have configurations of their own, and their text none.
OF_TOWERS = {
    "Phi4MultimodalForCausalLM": (
        {"num_key_value_heads": 2, "vision_config": SMALL_VIT, "audio_config": {"num_blocks": 1}},
        ["model.embed_tokens_extend"],
    ),
    "GitForCausalLM": ({"vision_config": SMALL_VIT}, ["git.image_encoder"]),
}


@pytest.mark.parametrize(("architecture", "fields", "towers"), [(name, *rest) for name, rest in OF_TOWERS.items()])
@pytest.mark.parametrize("keyword", ["qkv", "attention", "mlp", "all-linear"])
def test_towers_are_left_alone_where_the_text_has_no_configuration(architecture, fields, towers, keyword, warnings):
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**tiny.SIZES | fields))
    assert find_language_model(model) == "" and find_towers(model) == towers
    found = find_targets(model, SMTConfig(target_modules=keyword))
    assert found and not any(name.startswith(towers[0]) for name in found)
    assert any(f"means the language model; `{towers[0]}` is left alone" in line for line in warnings())


@pytest.mark.parametrize("name", ["Llama", "ViT", "CLIP", "LLaVA"])
def test_other_models_have_no_towers_apart(name):
    assert find_towers(FAMILIES[name].build()) == []
