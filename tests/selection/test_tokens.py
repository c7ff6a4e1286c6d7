"""Rows of named tokens, alone and beside other blocks."""

import numpy as np
import pytest
import tiny
import torch

from smt_trainer import BlockSelection, SMTConfig, SMTError, select_tokens

NAME = "model.embed_tokens"


def test_exactly_the_rows_of_the_tokens_are_selected(tmp_path):
    selection = select_tokens(tiny.llama(tie_word_embeddings=True), [9, 3, 9])
    assert selection.block_indices[NAME].tolist() == [[3, 0], [9, 0]]
    assert selection.trainable_parameters == 2 * 64 and list(selection.grids) == [NAME]
    selection.save(tmp_path / "tokens.json")
    assert BlockSelection.load(tmp_path / "tokens.json").grids == selection.grids


def test_other_blocks_and_their_configuration_stay():
    model = tiny.llama()
    blocks = tiny.choose(model)
    both = select_tokens(model, [5], beside=blocks)
    assert list(both.grids) == [NAME, *blocks.grids] and both.config == blocks.config
    assert both.num_blocks == blocks.num_blocks + 1 and both.block_indices[NAME].tolist() == [[5, 0]]
    more = select_tokens(model, [6, 5], beside=both)
    assert more.block_indices[NAME].tolist() == [[5, 0], [6, 0]] and more.num_blocks == both.num_blocks + 1


@pytest.mark.parametrize("tokens", [np.array([5, 6]), torch.tensor([6, 5]), [np.int32(5), torch.tensor(6), 5]], ids=str)
def test_ids_may_be_of_numpy_or_torch(tokens):
    assert select_tokens(tiny.llama(), tokens).block_indices[NAME].tolist() == [[5, 0], [6, 0]]


@pytest.mark.parametrize(("tokens", "found"), [([64], "64"), ([-1], "-1"), ([2, None], "None"), ([], "'none'")])
def test_tokens_outside_the_vocabulary_are_refused(tokens, found):
    with pytest.raises(SMTError, match=rf"ids from 0 to 63, the rows of `{NAME}`, got {found}"):
        select_tokens(tiny.llama(), tokens)


def test_blocks_of_another_shape_are_not_mixed_with_rows():
    model = tiny.llama()
    blocks = tiny.choose(model, SMTConfig(target_modules=["embed_tokens"], score="random", block_size=16, budget=2))
    with pytest.raises(SMTError, match=rf"has blocks of 16x16 in `{NAME}`, and tokens are whole rows"):
        select_tokens(model, [3], beside=blocks)
