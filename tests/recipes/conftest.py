import pytest
import torch
from texts import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder for the recipe and for `evaluate`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache" / "metrics")
    return tmp_path / "cache" / "smt_trainer"


@pytest.fixture
def tokenizer():
    """A lossless tokenizer with one token for each byte, which puts BOS before a text; it needs no file."""
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A Llama with two layers and grouped queries, in float64 so that padding changes no token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(torch.float64)
