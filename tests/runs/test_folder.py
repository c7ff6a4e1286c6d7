"""The output folder means one thing: a delta, with what the trained model has beside its weights."""

import pytest
import tiny
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from smt_trainer import SMTError, from_delta, merge_and_unload, save_delta


@pytest.fixture
def trained(base, tmp_path):
    """A trainer after training, and its output folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = 5
    trainer = tiny.smt_trainer(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    return trainer, tmp_path / "out"


def test_the_configuration_is_there_and_the_generation_config_travels(trained, base):
    trainer, folder = trained
    assert AutoConfig.from_pretrained(folder).hidden_size == trainer.model.config.hidden_size
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 5
    again = from_delta(folder, base=str(base))
    assert again.generation_config.eos_token_id == 5
    assert torch.equal(tiny.logits(again), tiny.logits(trainer.model))


@pytest.mark.parametrize("stale", [False, True], ids=["delta alone", "beside a full model of before"])
def test_from_pretrained_says_what_to_call_instead(stale, trained, base):
    _, folder = trained
    if stale:
        (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises((OSError, ValueError), match=r"smt_trainer\.from_delta"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_with_a_whole_model_is_refused_before_training_and_on_saving(trained, base, tmp_path):
    trainer, _ = trained
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(SMTError, match=r"base holds a whole model \(model.safetensors\).*Give another folder"):
        trainer.save_model(str(base))
    with pytest.raises(SMTError, match="holds a whole model"):
        save_delta(trainer.model, base)
    with pytest.raises(SMTError, match="holds a whole model"):
        tiny.smt_trainer(AutoModelForCausalLM.from_pretrained(base), base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_checkpoint_can_be_merged_and_saved_as_a_plain_model(trained, tmp_path):
    trainer, _ = trained
    plain = merge_and_unload(trainer.model)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), tiny.logits(plain))


def test_labels_of_a_classifier_travel(tmp_path):
    tiny.build("BertForMaskedLM").save_pretrained(tmp_path / "base")
    labels = {0: "bad", 1: "fair", 2: "good"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=labels)
    data = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(tiny.tokens(16))]
    trainer = tiny.smt_trainer(model, tmp_path / "run", data=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "delta"))
    again = from_delta(tmp_path / "delta", base=str(tmp_path / "base"))
    assert again.config.id2label == labels and type(again) is type(merge_and_unload(model))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
