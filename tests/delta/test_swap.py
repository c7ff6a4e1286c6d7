"""One base in memory, many deltas."""

import copy

import pytest
import quantised
import tiny
import torch
from transformers import AutoModelForCausalLM

from smt_trainer import Delta, SMTError, applied, convert_to_smt, from_delta, save_delta, swap
from smt_trainer.selection.block_selection import base_name

KINDS = {
    "blocks": {},
    "rows": {"granularity": "row", "block_size": "auto", "budget": 9},
    "columns": {"granularity": "column", "block_size": "auto", "budget": 9},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "norms": {"train_norm": True},
}


def tune(model, folder, seed, **fields):
    """Save a delta of a plain model with changed values; return the folder."""
    model = copy.deepcopy(model)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields), seed))
    torch.manual_seed(seed)
    tiny.disturb(model)
    save_delta(model, folder)
    return folder


def merged(folder, base):
    return tiny.weights(from_delta(folder, base=base))


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_swapped_in_is_the_merged_model_and_out_the_base(kind, dtype, llama, tmp_path):
    base = tmp_path / "base"
    llama.to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = tiny.weights(model)
    delta = tune(model, tmp_path / "delta", 1, **KINDS[kind])
    swap(model, delta)
    tiny.assert_same(dict(model.state_dict()), merged(delta, base))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    swap(model, None)
    tiny.assert_same(dict(model.state_dict()), before)


def test_deltas_follow_each_other_in_any_order(model, base, tmp_path):
    before, folders = tiny.weights(model), [tune(model, tmp_path / str(seed), seed) for seed in range(3)]
    deltas = [Delta.load(folder) for folder in folders]
    for place in (0, 1, 1, 2, 0, None, 2):
        swap(model, None if place is None else deltas[place])
        expected = before if place is None else merged(folders[place], base)
        tiny.assert_same(dict(model.state_dict()), expected)


def test_contexts_nest_and_end_in_an_exception_as_they_began(model, base, tmp_path):
    before, (first, second) = tiny.weights(model), [tune(model, tmp_path / str(seed), seed) for seed in range(2)]
    with applied(model, first) as same:
        assert same is model
        with pytest.raises(ZeroDivisionError), applied(model, second):
            tiny.assert_same(dict(model.state_dict()), merged(second, base))
            raise ZeroDivisionError
        tiny.assert_same(dict(model.state_dict()), merged(first, base))
    tiny.assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("build", [tiny.gpt2, lambda: tiny.llama(tie_word_embeddings=True)], ids=["GPT-2", "tied"])
def test_transposed_weights_and_tied_ones(build, tmp_path):
    base, plain = tmp_path / "base", build()
    plain.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    delta = tune(model, tmp_path / "delta", 1)
    with applied(model, delta):
        tiny.assert_same(dict(model.state_dict()), merged(delta, base))
    tiny.assert_same(dict(model.state_dict()), dict(AutoModelForCausalLM.from_pretrained(base).state_dict()))


def test_a_swapped_model_is_plain_and_is_saved_as_it_is(model, base, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    names = model.state_dict().keys()
    with applied(model, delta):
        assert model.state_dict().keys() == names
        model.save_pretrained(tmp_path / "saved")
        assert base_name(model) is None
    assert base_name(model) is not None
    tiny.assert_same(tiny.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), merged(delta, base))


def test_a_delta_of_another_base_is_refused_first_and_later(model, base, tmp_path):
    other = tiny.llama(seed=7)
    ours, theirs = tune(model, tmp_path / "ours", 1), tune(other, tmp_path / "theirs", 1)
    before = tiny.weights(model)
    with pytest.raises(SMTError, match="has other values in"):
        swap(model, theirs)
    tiny.assert_same(dict(model.state_dict()), before)
    with applied(model, ours):
        with pytest.raises(SMTError, match="was trained on another base than the one that is swapped in"):
            swap(model, theirs)
        tiny.assert_same(dict(model.state_dict()), merged(ours, base))


def test_what_cannot_be_swapped_into_is_refused(model, base, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    rewritten = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(rewritten, tiny.choose(rewritten))
    with pytest.raises(SMTError, match=r"this model trains blocks\. Use load_delta"):
        swap(rewritten, delta)
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SMTError, match="not over a quantised base"):
        swap(quantised.load(base, "nf4"), delta)


def test_other_rows_of_the_vocabulary_are_refused(model, tmp_path):
    delta = tune(model, tmp_path / "delta", 1, modules_to_save=["embed_tokens", "lm_head"])
    model.resize_token_embeddings(tiny.VOCABULARY + 4)
    with pytest.raises(SMTError, match="Load the base"):
        swap(model, delta)
