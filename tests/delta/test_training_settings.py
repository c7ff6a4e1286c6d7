"""What a model was trained with that its base has otherwise comes back with its delta."""

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from smt_trainer import SMTError, export_lora, from_delta, merge_checkpoint
from smt_trainer.delta.training_settings import training_settings

CHANGED = {
    "a longer context": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "another epsilon": {"rms_norm_eps": 0.1},
    "another activation": {"hidden_act": "relu"},
    "fewer layers": {"num_hidden_layers": 1},
    "the class's default": {"max_position_embeddings": 2048},
}


def train(model, folder):
    """Train a model for a step, and save its delta; return the logits of the trained model."""
    trainer = tiny.smt_trainer(model, folder / "run", tiny.config(score="random"), max_steps=1)
    trainer.train()
    trainer.save_model(folder / "delta")
    return tiny.logits(trainer.model)


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_changed_on_loading_comes_back(name, base, tmp_path):
    expected = train(AutoModelForCausalLM.from_pretrained(base, **CHANGED[name]), tmp_path)
    model = from_delta(tmp_path / "delta", base=str(base))
    tiny.assert_same(tiny.logits(model), expected)
    for field, value in CHANGED[name].items():
        assert getattr(model.config, field) == value


def test_a_setting_that_the_user_gives_has_precedence(base, tmp_path):
    train(AutoModelForCausalLM.from_pretrained(base, rms_norm_eps=0.1), tmp_path)
    assert from_delta(tmp_path / "delta", base=str(base), rms_norm_eps=0.2).config.rms_norm_eps == 0.2
    config = transformers.AutoConfig.from_pretrained(base)
    assert from_delta(tmp_path / "delta", base=str(base), config=config).config.rms_norm_eps == config.rms_norm_eps


def test_a_model_as_its_base_was_has_no_settings_of_its_own(base, tmp_path):
    train(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert training_settings(tmp_path / "delta", str(base), {}) == {}


@pytest.mark.parametrize("write", [merge_checkpoint, export_lora])
def test_a_delta_of_fewer_layers_is_not_written_for_all(write, base, tmp_path):
    train(AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=1), tmp_path)
    with pytest.raises(SMTError, match=r"num_hidden_layers=1, and .*base has 2.*in memory"):
        write(base, tmp_path / "delta", tmp_path / "other")


def test_a_merged_checkpoint_computes_with_the_settings_of_training(base, tmp_path):
    expected = train(AutoModelForCausalLM.from_pretrained(base, rms_norm_eps=0.1), tmp_path)
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    tiny.assert_same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_with_another_number_of_labels_comes_back(labels, tmp_path):
    tiny.build("LlamaForSequenceClassification", num_labels=3).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    data = [{"input_ids": row, "labels": torch.tensor(index % labels)} for index, row in enumerate(tiny.tokens(16))]
    trainer = tiny.smt_trainer(model, tmp_path / "run", tiny.config(), data=data, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    again = from_delta(tmp_path / "delta", base=str(tmp_path / "base"))
    assert again.config.num_labels == labels
    tiny.assert_same(tiny.logits(again), tiny.logits(trainer.model))
