import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.parts.model import DEFAULT_MODEL, resolve_model


@pytest.mark.parametrize("name", ["organisation/model", "folder/of/model"])
def test_any_other_name_is_left_to_from_pretrained(name):
    assert resolve_model(name) == name


@pytest.mark.slow
def test_the_default_model_is_prepared_once_and_complete(monkeypatch):
    monkeypatch.undo()  # the real cache folder
    folder = resolve_model(DEFAULT_MODEL)
    assert resolve_model(DEFAULT_MODEL) == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template
    assert tokenizer.tokenize("answer12") == ["answer", "1", "2"]
    text = "  In 1923,\nDon't  write «naïve» 12:45 \t 東京 🙂 "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
