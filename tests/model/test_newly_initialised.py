"""Newly initialised parameters are stored with the delta, or refused by name."""

import copy

import pytest
import tiny
import torch
import transformers
from mixtures import mixture
from transformers import AutoModelForCausalLM

from smt_trainer import (
    SMTError,
    convert_to_smt,
    from_delta,
    load_delta,
    merge_and_unload,
    merge_checkpoint,
    save_delta,
)
from smt_trainer.model.newly_initialised import new_rows, newly_initialised


@pytest.fixture
def encoder(tmp_path):
    """A BERT without a pooler and without any head, on disk."""
    tiny.build("BertForMaskedLM").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


HEADS = {
    "AutoModelForQuestionAnswering": {
        "start_positions": torch.ones(4).long(),
        "end_positions": torch.ones(4).long() * 2,
    },
    "AutoModelForSequenceClassification": {"labels": torch.arange(4) % 2},
    "AutoModelForTokenClassification": {"labels": tiny.tokens(4) % 2},
    "AutoModelForNextSentencePrediction": {"labels": torch.arange(4) % 2},
}


@pytest.mark.parametrize("auto", HEADS)
def test_a_new_head_and_pooler_are_trained_and_come_back(auto, encoder, tmp_path):
    auto_class = getattr(transformers, auto)
    model = auto_class.from_pretrained(encoder)
    new = newly_initialised(model)
    assert new and all("encoder" not in name for name in new)
    before = tiny.weights(model)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, input_ids=tiny.tokens(4), **HEADS[auto])
    after = tiny.weights(model)
    assert all(not torch.equal(after[name], before[name]) for name in new)
    save_delta(model, tmp_path / "delta")
    torch.manual_seed(7)
    again = from_delta(tmp_path / "delta", base=str(encoder))
    assert type(again) is type(merge_and_unload(model))
    tiny.assert_same(tiny.weights(again), tiny.weights(model))


def test_another_class_is_refused_naming_what_would_be_random(encoder, tmp_path):
    model = transformers.AutoModelForTokenClassification.from_pretrained(encoder)
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    with pytest.raises(
        SMTError, match=r"newly initialised `qa_outputs.weight`.*Load the base as BertForTokenClassification"
    ):
        from_delta(tmp_path / "delta", transformers.AutoModelForQuestionAnswering, base=str(encoder))


def test_a_newly_initialised_parameter_that_is_left_out_by_name_is_refused(encoder):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(encoder)
    with pytest.raises(SMTError, match=r"newly initialised `qa_outputs.weight`.*modules_to_save=\[\] leaves it out"):
        convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=[])))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_trained_whole_if_it_is_named_and_comes_back(tied, tmp_path):
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    assert "model.embed_tokens.weight" in newly_initialised(model)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=names)))
    tiny.step(model, **tiny.batch())
    trainer = tiny.smt_trainer(model, tmp_path / "run", model.smt_state.selection.config)
    trainer.save_model(str(tmp_path / "delta"))
    expected = tiny.logits(model)
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        from_delta(tmp_path / "delta", base=str(tmp_path / "base")),
        load_delta(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "delta"),
    ):
        assert again.config.vocab_size == 70 and again.get_input_embeddings().num_embeddings == 70
        assert torch.equal(tiny.logits(again), expected)


def test_a_vocabulary_that_shrank_is_refused_unless_it_is_named(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(50)
    assert new_rows(model) == {}
    with pytest.raises(
        SMTError, match=r"`model.embed_tokens.weight` has other rows.*modules_to_save=\['embed_tokens'\]"
    ):
        tiny.smt_trainer(model, tmp_path / "run")


def test_a_mark_that_was_lost_makes_nothing_new(encoder):
    """A device map drops some."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(encoder)
    expected = newly_initialised(model)
    for parameter in list(model.parameters())[:6]:
        vars(parameter).clear()
    assert newly_initialised(model) == expected == ["qa_outputs.weight", "qa_outputs.bias"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_of_a_checkpoint_without_safetensors_must_be_named(tied, tmp_path):
    model = tiny.llama(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert newly_initialised(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    with pytest.raises(
        SMTError, match=r"other rows than the model's checkpoint.*modules_to_save=\['(embed_tokens|lm_head)'\]"
    ):
        convert_to_smt(model, tiny.choose(model))
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=names)))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "delta")
    tiny.assert_same(tiny.logits(from_delta(tmp_path / "delta", base=str(tmp_path / "base"))), tiny.logits(model))


def test_a_model_from_a_configuration_has_nothing_newly_initialised(llama):
    assert newly_initialised(llama) == [] == newly_initialised(tiny.albert())


def test_statistics_that_training_changed_come_back(tmp_path):
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.norm = torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32)

        def forward(self, x):
            return self.norm(self.q_proj(x))

    torch.manual_seed(3)
    model, base = Normalised(), Normalised()
    base.load_state_dict(model.state_dict())
    convert_to_smt(model, tiny.every_block(model, ["q_proj"], target_modules=["q_proj"], score="random"))
    model(torch.randn(8, 32) + 2)
    save_delta(model, tmp_path / "delta")
    again = load_delta(base, tmp_path / "delta", merge=True)
    tiny.assert_same(tiny.weights(again), tiny.weights(merge_and_unload(model)))


def test_a_copy_of_a_loaded_model_is_as_new_as_the_model(encoder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert newly_initialised(copy.deepcopy(model)) == newly_initialised(model)
    assert {name.rpartition(".")[0] for name in newly_initialised(model)} == {
        "bert.embeddings.word_embeddings",
        "bert.pooler.dense",
        "classifier",
    }


def test_nothing_is_new_in_a_copy_whose_names_loading_converts(tmp_path):
    mixture().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert newly_initialised(copy.deepcopy(loaded)) == newly_initialised(loaded) == []
