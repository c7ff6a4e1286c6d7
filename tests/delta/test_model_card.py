"""The model card on the hub: its code runs, and gives the trained model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from architectures import ARCHITECTURES
from huggingface_hub import ModelCard
from texts import byte_tokenizer

from smt_trainer import convert_to_smt, push_delta
from smt_trainer.delta.model_card import delta_card
from smt_trainer.model.base import base_name

VIT = {"image_size": 8, "patch_size": 4, "num_labels": 3}
# Class of training -> what its base is stored as, the class that the card names, its task, inputs.
CASES = {
    "LlamaForCausalLM": ("LlamaForCausalLM", "AutoModelForCausalLM", "text-generation", {}),
    "T5ForConditionalGeneration": (
        *("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "text2text-generation"),
        {"decoder_input_ids": tiny.tokens(3, 4)},
    ),
    "BertForSequenceClassification": ("BertModel", "AutoModelForSequenceClassification", "text-classification", {}),
    "BertForTokenClassification": ("BertModel", "AutoModelForTokenClassification", "token-classification", {}),
    "ViTForImageClassification": ("ViTModel", "AutoModelForImageClassification", "image-classification", {}),
}


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


def build(kind):
    return tiny.build(kind, **(VIT if kind.startswith("ViT") else ARCHITECTURES.get(kind, ({},))[0]))


def inputs_of(kind, more):
    if kind.startswith("ViT"):
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": tiny.tokens(3)} | more


@pytest.mark.parametrize(("kind", "case"), CASES.items(), ids=CASES)
def test_the_code_of_the_card_gives_the_trained_model(kind, case, hub, tmp_path):
    stored, auto_class, task, more = case
    build(stored).save_pretrained(tmp_path / "base")
    hub.upload("someone/base", tmp_path / "base")
    hub.repositories["someone/base"].tags.append("license:mit")
    labels = {"num_labels": 3} if "Classification" in kind else {}
    model = getattr(transformers, kind).from_pretrained("someone/base", **labels)
    convert_to_smt(model, replace(tiny.choose(model), base_model=base_name(model)))
    tiny.disturb(model)
    tiny.smt_trainer(model, tmp_path / "run", tiny.config(score="random")).save_model(tmp_path / "delta")
    if kind.startswith("ViT"):
        transformers.ViTImageProcessorPil().save_pretrained(tmp_path / "delta")
    else:
        byte_tokenizer().save_pretrained(tmp_path / "delta")
    push_delta(tmp_path / "delta", "me/delta")

    card = hub.files("me/delta")["README.md"].decode()
    names = {}
    exec(code_of(card), names)
    assert type(names["model"]) is type(build(kind)) and auto_class in names
    inputs = inputs_of(kind, more)
    tiny.assert_same(tiny.logits(names["model"], **inputs), tiny.logits(model, **inputs))
    if kind.startswith("ViT"):
        assert names["processor"].size == transformers.ViTImageProcessorPil().size
    else:
        assert names["tokenizer"]("ab").input_ids == byte_tokenizer()("ab").input_ids
    head = ModelCard(card).data
    assert (head.pipeline_tag, head.library_name, head.license) == (task, "smt_trainer", "mit")
    assert (head.base_model, head.base_model_relation) == ("someone/base", "adapter")


def test_of_a_base_that_is_not_on_the_hub_the_code_asks_for_its_place(llama):
    card = delta_card("# x", tiny.choose(llama), "LlamaForCausalLM", Path("nowhere"), "me/delta")
    assert 'from_delta("me/delta", AutoModelForCausalLM, base="path/to/base")' in code_of(card)
    assert "base_model" not in card and "Tokenizer" not in card


def test_of_a_base_on_the_hub_the_code_says_no_place(llama):
    selection = replace(tiny.choose(llama), base_model="someone/base")
    card = delta_card("# x", selection, "LlamaForCausalLM", Path("nowhere"), "me/delta")
    assert 'from_delta("me/delta", AutoModelForCausalLM)' in code_of(card)


def test_a_class_of_another_library_is_named_as_it_is(llama):
    card = delta_card("# x", tiny.choose(llama), "MyModel", Path("nowhere"), "me/delta")
    assert 'from_delta("me/delta", MyModel, ' in code_of(card) and "transformers" not in code_of(card)
    assert "| class | `MyModel` |" in card


def test_what_a_card_says_already_stays(llama):
    card = "---\nlanguage: de\ndatasets:\n- squad\n---\n# Mine\n\n## Quick start\nload it whole\n## Use\nbe kind\n"
    described = ModelCard(delta_card(card, tiny.choose(llama), "LlamaForCausalLM", Path("nowhere"), "me/delta"))
    assert (described.data.language, described.data.datasets) == ("de", ["squad"])
    assert "be kind" in described.text and "load it whole" not in described.text
