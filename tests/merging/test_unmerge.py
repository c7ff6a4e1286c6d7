"""What was merged is taken out again, bit for bit."""

import arithmetic
import pytest
import quantised
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, extract_delta, merge_checkpoint, unmerge
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE

CASES = {
    "llama": (tiny.llama, {}),
    "whole": (tiny.llama, {"train_norm": True, "modules_to_save": ["lm_head"]}),
    "tied": (lambda: tiny.llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}),
    "transposed": (tiny.gpt2, {"target_modules": "all-linear", "train_bias": True}),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "40KB"])
@pytest.mark.parametrize(("build", "fields"), CASES.values(), ids=CASES)
def test_the_base_comes_back_file_by_file(build, fields, size, dtype, tmp_path):
    base, delta, merged, back = (tmp_path / name for name in ("base", "delta", "merged", "back"))
    build().to(dtype).save_pretrained(base, max_shard_size=size)
    (base / "tokenizer.json").write_text('{"of": "the base"}')
    arithmetic.train(build().to(dtype), delta, **fields)
    (delta / "tokenizer.json").write_text('{"of": "training"}')
    merge_checkpoint(base, delta, merged)
    assert contents(merged) != contents(base)
    assert unmerge(base, delta, merged, back) == back
    assert contents(back) == contents(base)


@pytest.fixture
def case(base, tmp_path):
    """Return the base, a delta and the merged checkpoint."""
    delta = arithmetic.train(tiny.llama(), tmp_path / "delta", train_norm=True)
    return base, delta, merge_checkpoint(base, delta, tmp_path / "merged")


def test_the_files_are_those_of_the_merged_checkpoint(case, tmp_path):
    base, delta, merged = case
    AutoModelForCausalLM.from_pretrained(merged).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    unmerge(base, delta, tmp_path / "shards", tmp_path / "back")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "back"), tiny.saved_tensors(base))
    assert (tmp_path / "back" / INDEX_FILE).is_file() and not (tmp_path / "back" / SINGLE_FILE).exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tiny.assert_same(tiny.logits(model), tiny.logits(tiny.llama()))


def test_another_vocabulary_is_taken_back(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    delta = arithmetic.train(model, tmp_path / "delta", modules_to_save=["embed_tokens", "lm_head"])
    merge_checkpoint(base, delta, tmp_path / "merged")
    unmerge(base, delta, tmp_path / "merged", tmp_path / "back")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "back"), tiny.saved_tensors(base))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == tiny.VOCABULARY


def test_without_the_base_a_delta_leads_back(case, tmp_path):
    base, _, merged = case
    extract_delta(merged, base, tmp_path / "way back", block_size=16)
    merge_checkpoint(merged, tmp_path / "way back", tmp_path / "again")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "again"), tiny.saved_tensors(base))


def test_a_merge_onto_what_was_quantised_is_taken_back(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    delta = arithmetic.train(quantised.load(base, "nf4"), tmp_path / "delta")
    merge_checkpoint(base, delta, tmp_path / "merged", onto="original")
    unmerge(base, delta, tmp_path / "merged", tmp_path / "back", onto="original")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "back"), tiny.saved_tensors(base))
    with pytest.raises(SMTError, match="nothing of the base is left"):
        unmerge(base, delta, tmp_path / "merged", tmp_path / "other", onto="dequantized")


# ---- refused ----


@pytest.mark.parametrize("key", ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_what_was_changed_after_merging_is_refused(key, case, tmp_path):
    base, delta, merged = case
    weights = load_file(merged / SINGLE_FILE)
    weights[key].view(-1)[0] += 1
    save_file(weights, merged / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(SMTError, match=rf"is not .*base with the delta merged into it: `{key}` .*1 of"):
        unmerge(base, delta, merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_holds_no_merge_of_this_delta_is_refused(case, tmp_path):
    base, delta, merged = case
    other = arithmetic.train(tiny.llama(), tmp_path / "other", seed=5)
    with pytest.raises(SMTError, match=r"is not .* with the delta merged into it"):
        unmerge(base, other, merged, tmp_path / "back")
    with pytest.raises(SMTError, match="other values in"):
        unmerge(merged, delta, merged, tmp_path / "back")
    with pytest.raises(SMTError, match=r"lies in .*merged"):
        unmerge(base, delta, merged, merged / "back")
