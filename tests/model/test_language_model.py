"""Finding the language model in a larger model."""

import pytest
import tiny
from families import FAMILIES
from torch import nn

from smt_trainer.model.language_model import find_language_model, modules_beside


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
