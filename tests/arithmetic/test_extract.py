"""Any fine-tuning becomes a delta: exactly, or the best within a budget."""

import json
import math

import arithmetic
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import grids
from transformers import AutoModelForCausalLM

from smt_trainer import (
    SMTError,
    extract_delta,
    from_delta,
    load_delta,
    merge_checkpoint,
    verify_merge,
)
from smt_trainer.arithmetic.change_norms import block_norms, change_norm, differing_blocks
from smt_trainer.arrays import as_array
from smt_trainer.delta.delta import Delta
from smt_trainer.model.checkpoint import SINGLE_FILE
from smt_trainer.model.fingerprint import Fingerprint

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def rewrite(folder, change):
    """Save a checkpoint of one file again after `change` has edited its tensors."""
    weights = load_file(folder / SINGLE_FILE)
    change(weights)
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.fixture
def pair(tmp_path):
    """Return a function that saves a base and the same model after training, merged; the two folders are returned."""

    def saved(build, dtype=torch.float32, size="1GB", **fields):
        build().to(dtype).save_pretrained(tmp_path / "base", max_shard_size=size)
        delta = arithmetic.train(build().to(dtype), tmp_path / "delta", **fields)
        merge_checkpoint(tmp_path / "base", delta, tmp_path / "tuned")
        return tmp_path / "base", tmp_path / "tuned"

    return saved


CASES = {
    "llama": (tiny.llama, {}),
    "norms": (tiny.llama, {"train_norm": True}),
    "embeddings": (tiny.llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": (lambda: tiny.llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}),
    "transposed, tied, biases": (tiny.gpt2, {"target_modules": "all-linear", "train_bias": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "40KB"])
@pytest.mark.parametrize(("build", "fields"), CASES.values(), ids=CASES)
def test_merging_what_was_extracted_gives_the_tuned_checkpoint(build, fields, size, dtype, pair, tmp_path):
    base, tuned = pair(build, dtype, size, **fields)
    found = extract_delta(base, tuned, tmp_path / "extracted", block_size=16)
    merge_checkpoint(base, tmp_path / "extracted", tmp_path / "merged")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "merged"), tiny.saved_tensors(tuned))
    assert verify_merge(base, tmp_path / "extracted", tuned).problems == []
    assert (found.is_exact, found.left, found.left_of) == (True, 0, {})
    trained, extracted = (Delta.load(tmp_path / name) for name in ("delta", "extracted"))
    assert extracted.fingerprint == trained.fingerprint
    assert {*extracted.whole_arrays} <= {*trained.whole_arrays}
    for name, indices in extracted.selection.block_indices.items():
        assert {*map(tuple, indices)} <= {*map(tuple, trained.selection.block_indices[name])}
    tiny.assert_same(
        tiny.logits(from_delta(tmp_path / "extracted", base=base)),
        tiny.logits(AutoModelForCausalLM.from_pretrained(tuned)),
    )


def test_what_was_extracted_is_trained_further(pair, tmp_path):
    base, tuned = pair(tiny.llama, train_norm=True)
    extract_delta(base, tuned, tmp_path / "extracted")
    model = load_delta(AutoModelForCausalLM.from_pretrained(base), tmp_path / "extracted")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert NORM in names and any(name.endswith(".blocks") for name in names)
    tiny.assert_same(tiny.logits(model), tiny.logits(AutoModelForCausalLM.from_pretrained(tuned)))


def test_the_way_back_is_a_delta_of_the_tuned_checkpoint(pair, tmp_path):
    base, tuned = pair(tiny.llama, train_norm=True)
    extract_delta(tuned, base, tmp_path / "back")
    merge_checkpoint(tuned, tmp_path / "back", tmp_path / "again")
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "again"), tiny.saved_tensors(base))


@pytest.mark.parametrize("fields", [{"granularity": "row"}, {"granularity": "column"}, {"block_size": (8, 32)}])
def test_any_shape_of_blocks_is_exact(fields, pair, tmp_path):
    base, tuned = pair(tiny.llama)
    extract_delta(base, tuned, tmp_path / "extracted", **fields)
    assert verify_merge(base, tmp_path / "extracted", tuned).problems == []


def test_a_change_of_sign_of_zero_is_extracted(pair, tmp_path):
    base, tuned = pair(tiny.llama)
    for folder, zero in ((base, 0.0), (tuned, -0.0)):
        rewrite(folder, lambda weights, zero=zero: weights["model.layers.1.mlp.up_proj.weight"].fill_(zero))
    extract_delta(base, tuned, tmp_path / "extracted", target_modules="mlp")
    assert verify_merge(base, tmp_path / "extracted", tuned).problems == []


@pytest.fixture
def everywhere(tmp_path):
    """Save two models that differ in every value; return their folders."""
    for seed, name in enumerate(("base", "tuned")):
        tiny.llama(seed).save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize("fields", [{}, {"target_modules": "qkv"}, {"granularity": "row", "scope": "per_module"}])
def test_the_error_that_is_left_is_that_of_the_merge(fields, everywhere, tmp_path):
    base, tuned = everywhere
    shape = {} if "granularity" in fields else {"block_size": 16}
    found = extract_delta(base, tuned, tmp_path / "delta", budget=7, **fields, **shape)
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    before, after, merged = (tiny.saved_tensors(folder) for folder in (base, tuned, tmp_path / "merged"))
    change = {key: (after[key].double() - before[key].double()).norm() for key in before}
    left = {key: (after[key].double() - merged[key].double()).norm() for key in before}
    ours = {key: float(left[key] / change[key]) for key in before if left[key]}
    assert found.left_of == pytest.approx(ours, rel=1e-12)
    assert found.left == pytest.approx(math.hypot(*left.values()) / math.hypot(*change.values()), rel=1e-12)
    worst = max(ours, key=ours.get)
    assert f"`{worst}`" in str(found) or ours[worst] == 1


def test_no_other_blocks_leave_less(everywhere, tmp_path):
    base, tuned = everywhere
    extract_delta(base, tuned, tmp_path / "delta", budget=9, block_size=16, target_modules="qkv")
    selection = Delta.load(tmp_path / "delta").selection
    before, after = (tiny.saved_tensors(folder) for folder in everywhere)
    norms = {
        (name, row, column): block.double().norm().item()
        for name, grid in selection.grids.items()
        for row, line in enumerate(grid.split(after[f"{name}.weight"] - before[f"{name}.weight"]))
        for column, block in enumerate(line)
    }
    chosen = {(name, *place) for name, found in selection.block_indices.items() for place in found.tolist()}
    assert len(chosen) == 9
    assert min(norms[place] for place in chosen) >= max(norms[place] for place in norms.keys() - chosen)


def test_a_budget_takes_no_block_that_did_not_change(pair, tmp_path):
    base, tuned = pair(tiny.llama, budget=3)
    found = extract_delta(base, tuned, tmp_path / "extracted", budget=20, block_size=16)
    assert (found.selection.num_blocks, found.is_exact, found.left) == (3, True, 0)
    part = extract_delta(base, tuned, tmp_path / "part", budget=2, block_size=16)
    assert not part.is_exact and part.left > 0


@given(grid=grids(), data=st.data())
def test_blocks_and_norms_are_those_of_torch(grid, data):
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(grid.stored_shape, generator=generator).bfloat16()
    after = torch.where(torch.rand(grid.stored_shape, generator=generator) < 0.1, before + 1, before)
    arrays = as_array(before), as_array(after)
    change = grid.split(after.double() - before.double())
    assert differing_blocks(grid, *arrays).tolist() == (change != 0).any(-1).any(-1).tolist()
    torch.testing.assert_close(torch.from_numpy(block_norms(grid, *arrays)), change.pow(2).sum((2, 3)).sqrt())
    assert change_norm(*arrays) == pytest.approx(change.norm().item())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, lambda: tiny.llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_that_of_the_loaded_base(build, dtype, pair, tmp_path):
    base, tuned = pair(build, dtype, "40KB")
    extract_delta(base, tuned, tmp_path / "extracted", block_size=16)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert Delta.load(tmp_path / "extracted").fingerprint == Fingerprint.of(model, dtype)


def test_the_files_of_the_tuned_model_go_with_the_delta(pair, tmp_path):
    base, tuned = pair(tiny.llama)
    (tuned / "tokenizer.json").write_text('{"a": 1}')
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    extract_delta(base, tuned, tmp_path / "extracted")
    assert verify_merge(base, tmp_path / "extracted", tuned).problems == []
    assert from_delta(tmp_path / "extracted", base=base).config.bos_token_id == 5
    with pytest.raises(ValueError, match="this folder holds a delta"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "extracted")


# ---- refused ----


def other_names(base, tuned):
    rewrite(tuned, lambda weights: weights.pop(HEAD))
    return f"`{HEAD}` is in .*base and not in .*tuned"


def other_shape(base, tuned):
    rewrite(tuned, lambda weights: weights.update({HEAD: weights[HEAD][:60].clone()}))
    return rf"`{HEAD}` is float32 of \[64, 64\] in .*base, and float32 of \[60, 64\]"


def other_dtype(base, tuned):
    rewrite(tuned, lambda weights: weights.update({HEAD: weights[HEAD].half()}))
    return rf"`{HEAD}` is float32 of \[64, 64\] in .*base, and float16 of"


def the_same(base, tuned):
    rewrite(tuned, lambda weights: weights.update(load_file(base / SINGLE_FILE)))
    return "differs from .*base in no value"


def no_target(base, tuned):
    the_same(base, tuned)
    rewrite(tuned, lambda weights: weights[NORM].add_(1))
    return f"in no target, only in other tensors such as `{NORM}`"


def unknown_tensor(base, tuned):
    for number, folder in enumerate((base, tuned)):
        rewrite(folder, lambda weights, number=number: weights.update({"extra": torch.full((3,), float(number))}))
    return "`extra` is not in both .*base and its LlamaForCausalLM"


def infinite(base, tuned):
    rewrite(tuned, lambda weights: weights["model.layers.0.self_attn.q_proj.weight"].fill_(torch.inf))
    return "not all finite"


def quantised_base(base, tuned):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    return "base is quantised; give the plain weights"


def unknown_class(base, tuned):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    return "should name a model class of transformers as its architecture, got 'Mine'"


REFUSED = [other_names, other_shape, other_dtype, the_same, no_target, unknown_tensor, infinite]


@pytest.mark.parametrize("spoil", [*REFUSED, quantised_base, unknown_class])
def test_what_has_no_delta_is_refused_by_name_and_nothing_is_written(spoil, pair, tmp_path):
    base, tuned = pair(tiny.llama)
    expected = spoil(base, tuned)
    with pytest.raises(SMTError, match=expected):
        extract_delta(base, tuned, tmp_path / "extracted")
    assert not (tmp_path / "extracted").exists()


def test_a_tie_that_was_broken_is_refused(tmp_path):
    tied = tiny.llama(tie_word_embeddings=True)
    for name, amount in (("base", 0), ("tuned", 1)):
        tied.save_pretrained(tmp_path / name)
        head = tied.state_dict()[EMBEDDINGS] + amount
        rewrite(tmp_path / name, lambda weights, head=head: weights.update({HEAD: head.clone()}))
    rewrite(tmp_path / "tuned", lambda weights: weights["model.layers.0.self_attn.q_proj.weight"].add_(1))
    with pytest.raises(SMTError, match=f"no delta turns .* after merging, `{HEAD}` is not trained, and 4,096 of"):
        extract_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "extracted")


def test_fields_of_training_and_a_place_in_the_base_are_refused(pair):
    base, tuned = pair(tiny.llama)
    with pytest.raises(SMTError, match="train_norm has no effect on extracting"):
        extract_delta(base, tuned, base.parent / "out", train_norm=True)
    with pytest.raises(SMTError, match="scope has no effect on extracting without a budget; give some of budget, "):
        extract_delta(base, tuned, base.parent / "out", scope="per_module")
    with pytest.raises(SMTError, match=r"lies in .*tuned"):
        extract_delta(base, tuned, tuned / "delta")
