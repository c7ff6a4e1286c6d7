"""A model that is not its checkpoint any more is named before it is trained."""

import pytest
import tiny
import torch
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from smt_trainer import convert_to_smt, from_delta, merge_and_unload, save_delta

ROW = 4200


@pytest.fixture
def base(tmp_path):
    """Save a model whose embeddings the fingerprint only samples; return its folder."""
    tiny.llama(vocab_size=8192).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def convert(model):
    """Rewrite a model with random blocks."""
    return convert_to_smt(model, tiny.choose(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_said_of_a_model_as_it_was_loaded(dtype, base, warnings):
    convert(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))
    assert not warnings()


def test_nothing_is_said_of_rows_for_new_tokens(base, warnings):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(8200, mean_resizing=False)
    trainer_config = tiny.config(score="random", modules_to_save=["embed_tokens", "lm_head"])
    convert_to_smt(model, tiny.choose(model, trainer_config))
    assert not any("other values" in line for line in warnings())


def test_a_pruned_model_is_named(base, warnings):
    model = AutoModelForCausalLM.from_pretrained(base)
    layer = model.model.layers[1].mlp.down_proj
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    convert(model)
    assert any(f"layers.1.mlp.down_proj.weight`, have other values than in {base}" in line for line in warnings())


def test_a_merged_adapter_is_named(base, warnings):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    convert(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).merge_and_unload())
    assert any(line.startswith("2 tensors of this model") and "q_proj" in line for line in warnings())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_single_row_of_an_embedding_is_seen(name, base, warnings):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(name)[ROW, 3] += 1
    convert(model)
    assert any(f"1 tensors of this model, such as `{name}`" in line for line in warnings())


def test_a_merged_delta_has_a_warning_of_its_own(base, warnings, tmp_path):
    model = convert(AutoModelForCausalLM.from_pretrained(base))
    tiny.disturb(model)
    save_delta(model, tmp_path / "delta")
    convert(from_delta(tmp_path / "delta", base=str(base)))
    convert(merge_and_unload(model))
    assert not any("other values" in line for line in warnings())


def test_a_base_that_is_not_found_again_is_named(base, warnings, monkeypatch, tmp_path):
    monkeypatch.chdir(base.parent)
    model = AutoModelForCausalLM.from_pretrained("base")
    monkeypatch.chdir(tmp_path.parent)
    convert(model)
    (line,) = warnings()
    assert line.startswith("base, which this model was loaded from, is not found") and "new tokens" in line
