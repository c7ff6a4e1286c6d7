"""Which embeddings are targets."""

import logging

import pytest
import tiny
import torch
from torch import nn

from smt_trainer import SMTError
from smt_trainer.config import TARGET_KEYWORDS
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import find_targets, target_grids

ROWS = {"granularity": "row", "block_size": "auto"}


def of(names, **fields):
    return tiny.config(target_modules=names, **ROWS | fields)


@pytest.mark.parametrize("keyword", [word for word in TARGET_KEYWORDS if word not in ("experts", "all-conv")])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_no_keyword_means_embeddings(architecture, keyword):
    fields = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2} if "T5" in architecture else {}
    found = find_targets(tiny.build(architecture, **fields), tiny.config(target_modules=keyword))
    assert not any(isinstance(target, nn.Embedding) for target in found.values())


@pytest.mark.parametrize("names", [["embed_tokens"], r"model\.embed.*"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_patterns_mean_embeddings(names, tied):
    model = tiny.llama(tie_word_embeddings=tied, vocab_size=48)
    targets = find_targets(model, of(names))
    assert targets == {"model.embed_tokens": model.get_input_embeddings()}
    assert target_grids(targets, of(names)) == {"model.embed_tokens": BlockGrid(48, 64, 1, 64, embedding=True)}


def test_of_a_tied_pair_the_embedding_is_the_target(caplog):
    model = tiny.llama(tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        assert list(find_targets(model, of(["embed_tokens", "lm_head"]))) == ["model.embed_tokens"]
    assert "`lm_head` is not tuned: its weight is shared" in caplog.text


class Doubled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (nn.Embedding(64, 64, max_norm=1.0), "it has max_norm"),
        (nn.Embedding(64, 64, scale_grad_by_freq=True), "it has scale_grad_by_freq"),
        (nn.Embedding(64, 64, sparse=True), "it has sparse"),
        (Doubled(64, 64), "its class, Doubled, has a forward of its own"),
        (nn.Embedding(64, 64, dtype=torch.complex64), "its weight is not a plain matrix of floats"),
    ],
    ids=["max_norm", "scale_grad_by_freq", "sparse", "own forward", "complex"],
)
def test_what_computes_something_else_is_left_out_by_name(embedding, reason, caplog):
    model = tiny.llama()
    model.set_input_embeddings(embedding)
    with pytest.raises(SMTError, match="none of which can be tuned"):
        find_targets(model, of(["embed_tokens"]))
    assert f"`model.embed_tokens` is not tuned: {reason}" in caplog.text


def test_embeddings_that_share_a_weight_are_left_out_by_name(caplog):
    model = tiny.build("T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=96, num_layers=2)
    with pytest.raises(SMTError, match="none of which can be tuned"):
        find_targets(model, of(["shared"]))
    assert "its weight is shared with another Embedding" in caplog.text


def test_a_frozen_embedding_is_no_target(caplog):
    model = tiny.llama()
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(SMTError):
        find_targets(model, of(["embed_tokens"]))
    assert "frozen" in caplog.text


def test_a_grid_of_an_embedding_is_read_back_and_is_nothing_else():
    grid = BlockGrid(48, 64, 1, 64, embedding=True)
    assert BlockGrid.from_dict(grid.to_dict()) == grid != BlockGrid(48, 64, 1, 64)
    with pytest.raises(SMTError, match="not two of these"):
        BlockGrid(48, 64, 1, 64, transposed=True, embedding=True)
    with pytest.raises(SMTError, match="must be true or false, got 1"):
        BlockGrid.from_dict(grid.to_dict() | {"embedding": 1})
