"""Merges that are right are proven, and each way of getting one wrong is found."""

import json
import shutil

import pytest
import quantised
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, from_delta, merge_and_unload, merge_checkpoint, save_delta
from smt_trainer.merging.verify import verify_merge
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE
from smt_trainer.sparse.block_module import block_modules

UNTRAINED, TIED, HEAD = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


def train(model, folder, **fields):
    """Change the blocks of a model, and what is trained whole, and save its delta; return the model."""
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields)))
    tiny.step(model, **tiny.batch())
    with torch.no_grad():
        for _, linear in block_modules(model):
            linear.blocks += torch.randn_like(linear.blocks) / 8
    save_delta(model, folder)
    return model


@pytest.fixture
def merge(tmp_path):
    """Return a function that saves a base, trains it and merges the delta; the three folders are returned."""

    def merged(model, size="1GB", **fields):
        folders = [tmp_path / name for name in ("base", "delta", "merged")]
        model.save_pretrained(folders[0], max_shard_size=size)
        train(model, folders[1], **fields)
        write(folders[0], {"tokenizer.json": {}, "chat_template.jinja": "of the base"})
        files = {"tokenizer.json": {"a": 1}, "tokenizer_config.json": {"a": 2}, "chat_template.jinja": "trained"}
        write(folders[1], files | {"generation_config.json": {"do_sample": True}})
        model.config.save_pretrained(folders[1])
        merge_checkpoint(*folders)
        return folders

    return merged


@pytest.fixture
def case(merge):
    """Return base, delta and merged checkpoint of a tiny Llama in shards."""
    return merge(tiny.llama(), "40KB", train_norm=True)


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def shard_of(folder, key):
    index = folder / INDEX_FILE
    return folder / (json.loads(index.read_text())["weight_map"][key] if index.is_file() else SINGLE_FILE)


def edit(folder, key, change):
    """Change a tensor of a checkpoint; None drops it."""
    path = shard_of(folder, key)
    weights = load_file(path)
    changed = change(weights.pop(key))
    save_file(weights | ({} if changed is None else {key: changed}), path, metadata={"format": "pt"})


# ---- right ----

RIGHT = {
    "llama": (tiny.llama, {}),
    "whole modules": (tiny.llama, {"modules_to_save": ["embed_tokens"], "train_norm": True}),
    "tied": (lambda: tiny.llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}),
    "transposed and tied": (tiny.gpt2, {"target_modules": "all-linear", "modules_to_save": ["wte"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "40KB"])
@pytest.mark.parametrize(("build", "fields"), RIGHT.values(), ids=RIGHT)
def test_a_merge_is_proven_and_its_changes_counted(build, fields, size, dtype, merge):
    base, delta, merged = merge(build().to(dtype), size, **fields)
    found = verify_merge(base, delta, merged)
    before, after = tiny.saved_tensors(base), tiny.saved_tensors(merged)
    assert found.problems == [] and found.compared == len(before)
    changed = {key: int((tensor != after[key]).sum()) for key, tensor in before.items()}
    assert {key: counts.changed for key, counts in found.tensors.items()} == {
        key: count for key, count in changed.items() if count or key in found.tensors
    }
    assert all(
        counts.changed <= counts.trained <= counts.values == before[key].numel()
        for key, counts in found.tensors.items()
    )


def test_tensors_may_be_spread_over_files_in_another_way(case):
    base, delta, merged = case
    weights = tiny.saved_tensors(merged)
    for path in merged.glob("model*"):
        path.unlink()
    save_file(weights, merged / SINGLE_FILE, metadata={"format": "pt"})
    write(merged, {"README.md": "What we made of it", ".gitattributes": "hidden"})
    config = json.loads((merged / "config.json").read_text())
    write(merged, {"config.json": json.dumps(config, indent=7)})
    assert verify_merge(base, delta, merged).problems == []


def test_a_merge_in_memory_is_proven_but_for_its_other_files(base, delta, tmp_path):
    merge_and_unload(delta[1]).save_pretrained(tmp_path / "merged")
    assert verify_merge(base, delta[0], tmp_path / "merged").problems == []


def test_another_vocabulary_is_compared(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    train(model, tmp_path / "delta", modules_to_save=["embed_tokens", "lm_head"])
    model.config.save_pretrained(tmp_path / "delta")
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    assert verify_merge(base, tmp_path / "delta", tmp_path / "merged").problems == []
    edit(tmp_path / "merged", HEAD, lambda tensor: tensor[: tiny.VOCABULARY].clone())
    ((where, problem),) = verify_merge(base, tmp_path / "delta", tmp_path / "merged").problems
    assert (where, problem) == (HEAD, "should be float32 of [67, 64], is float32 of [64, 64]")


def test_a_delta_that_changed_nothing_is_proven_by_the_base(base, tmp_path):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    found = verify_merge(base, tmp_path / "delta", base)
    assert found.problems == [] and not any(counts.changed for counts in found.tensors.values())


# ---- wrong ----


def did_nothing(base, delta, merged):
    for path in base.glob("*.safetensors"):
        shutil.copyfile(path, merged / path.name)
    return {"norm.weight": "of 64 trained values are not the delta's (it has the base's)", "_proj.weight": "trained"}


def onto_another_base(base, delta, merged):
    other = tiny.llama()
    with torch.no_grad():
        other.get_parameter(UNTRAINED)[3, 5] += 1e-3
        other.get_parameter(TIED)[3] += 1e-3
    other.save_pretrained(merged.parent / "other", max_shard_size="40KB")
    for key in (UNTRAINED, TIED):
        edit(merged, key, lambda _, key=key: tiny.saved_tensors(merged.parent / "other")[key])
    return {UNTRAINED: "is not trained, and 1 of 6,144 values", TIED: "is not trained, and 64 of 4,096 values"}


def rounded_and_back(base, delta, merged):
    for key in tiny.saved_tensors(merged):
        edit(merged, key, lambda tensor: tensor.half().float())
    return {"_proj.weight": "values are not the", "norm.weight": "trained", TIED: "values", HEAD: "values"}


def rounded(base, delta, merged):
    for key in tiny.saved_tensors(merged):
        edit(merged, key, lambda tensor: tensor.half())
    return {"": "should be float32 of ["}


def changed_elsewhere(base, delta, merged):
    edit(merged, UNTRAINED, lambda tensor: tensor.index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(7.0)))
    return {UNTRAINED: "is not trained, and 1 of 6,144 values are not the base's"}


def changed_beside_the_blocks(base, delta, merged):
    trained = next(key for key in verify_merge(base, delta, merged).tensors if "proj" in key)
    edit(merged, trained, lambda tensor: tensor + 1)
    return {trained: "trained values are not the delta's and "}


def lost_tokenizer(base, delta, merged):
    (merged / "tokenizer.json").unlink()
    return {"tokenizer.json": "is missing"}


def template_of_the_base(base, delta, merged):
    shutil.copyfile(base / "chat_template.jinja", merged / "chat_template.jinja")
    return {"chat_template.jinja": "is not as merging writes it"}


def another_template(base, delta, merged):
    write(merged, {"chat_template.json": {}})
    return {"chat_template.json": "is from neither base nor training"}


def other_settings(base, delta, merged):
    write(merged, {"generation_config.json": {"do_sample": False, "top_k": 5}})
    return {"generation_config.json": "has other values of do_sample, top_k"}


def other_configuration(base, delta, merged):
    config = json.loads((merged / "config.json").read_text())
    write(merged, {"config.json": config | {"rms_norm_eps": 1e-5}})
    return {"config.json": "has other values of rms_norm_eps"}


def no_configuration(base, delta, merged):
    (merged / "config.json").write_text("{")
    return {"weights": "the configuration of the merged checkpoint at"}


def missing_shard(base, delta, merged):
    shard_of(merged, UNTRAINED).unlink()
    return {"weights": "no merged checkpoint at"}


def truncated_shard(base, delta, merged):
    path = shard_of(merged, UNTRAINED)
    path.write_bytes(path.read_bytes()[:-8])
    return {"weights": "is damaged or truncated"}


def no_weights(base, delta, merged):
    for path in merged.glob("model*"):
        path.unlink()
    return {"weights": "but has neither"}


def missing_tensor(base, delta, merged):
    index = json.loads((merged / INDEX_FILE).read_text())
    del index["weight_map"][UNTRAINED]
    edit(merged, UNTRAINED, lambda _: None)
    write(merged, {INDEX_FILE: index})
    return {UNTRAINED: "is missing"}


def extra_tensor(base, delta, merged):
    path = shard_of(merged, UNTRAINED)
    save_file(load_file(path) | {"extra": torch.zeros(1)}, path)
    return {"extra": "is not in the base"}


def transposed(base, delta, merged):
    edit(merged, UNTRAINED, lambda tensor: tensor.t().contiguous())
    return {UNTRAINED: "should be float32 of [96, 64], is float32 of [64, 96]"}


WRONG = [
    *(did_nothing, onto_another_base, rounded_and_back, rounded, changed_elsewhere, changed_beside_the_blocks),
    *(lost_tokenizer, template_of_the_base, another_template, other_settings, other_configuration, no_configuration),
    *(missing_shard, truncated_shard, no_weights, missing_tensor, extra_tensor, transposed),
]


@pytest.mark.parametrize("damage", WRONG)
def test_what_is_wrong_with_a_merge_is_found(damage, case):
    expected = damage(*case)
    problems = verify_merge(*case).problems
    assert problems
    for where, problem in problems:
        assert any(name in where and text in problem for name, text in expected.items()), (where, problem)
    assert all(any(name in where for where, _ in problems) for name in expected)


@pytest.mark.parametrize("told", [True, False])
def test_a_wrong_tie_is_found(told, merge):
    base, delta, merged = merge(tiny.llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"])
    weights = load_file(base / SINGLE_FILE)
    save_file(weights | {HEAD: weights[TIED].clone()}, base / SINGLE_FILE, metadata={"format": "pt"})
    ((where, problem),) = verify_merge(base, delta, merged).problems
    assert (where, problem) == (HEAD, "is missing")
    after = load_file(merged / SINGLE_FILE)
    stale, right = weights[TIED].clone(), after[TIED].clone()
    save_file(after | {HEAD: stale if told else right}, merged / SINGLE_FILE, metadata={"format": "pt"})
    problems = verify_merge(base, delta, merged).problems
    if told:
        assert problems == [
            (HEAD, f"{int((stale != right).sum()):,} of 4,096 trained values are not the delta's (it has the base's)")
        ]
    else:
        assert problems == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_bit_of_the_weights_counts(place, bit, base, delta, tmp_path):
    merged = tmp_path / "merged"
    if not merged.exists():
        merge_checkpoint(base, delta[0], merged)
    path = merged / SINGLE_FILE
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + int(place * (len(data) - start))
    for wrong in (True, False):
        data[at] ^= 1 << bit
        path.write_bytes(data)
        problems = verify_merge(base, delta[0], merged).problems
        assert len(problems) == wrong and all("1 of " in problem for _, problem in problems)


def test_a_base_that_is_not_the_deltas_is_refused(case):
    base, delta, merged = case
    with pytest.raises(SMTError, match="other values in"):
        verify_merge(merged, delta, merged)
    with pytest.raises(SMTError, match=r"no merged checkpoint at .*nowhere: expected a folder"):
        verify_merge(base, delta, base / "nowhere")


# ---- quantised bases ----


def test_merges_onto_what_was_quantised_are_verified_and_onto_dequantised_weights_refused(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    train(quantised.load(base, "nf4"), delta)
    merge_checkpoint(base, delta, merged, onto="original")
    assert verify_merge(base, delta, merged, onto="original").problems == []
    edit(merged, UNTRAINED, lambda tensor: tensor.bfloat16().float())
    assert [where for where, _ in verify_merge(base, delta, merged, onto="original").problems] == [UNTRAINED]
    with pytest.raises(SMTError, match="Choose a model: onto="):
        verify_merge(base, delta, merged)
    with pytest.raises(SMTError, match="no file holds the dequantised weights"):
        verify_merge(base, delta, merged, onto="dequantized")


def test_blocks_in_plain_weights_of_a_stored_quantised_base_are_verified(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    skipped = {"llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]}
    stored, delta, merged = (tmp_path / name for name in ("stored", "delta", "merged"))
    quantised.load(base, "nf4", **skipped).save_pretrained(stored)
    train(AutoModelForCausalLM.from_pretrained(stored), delta)
    merge_checkpoint(stored, delta, merged)
    assert verify_merge(stored, delta, merged).problems == []
    edit(merged, UNTRAINED, lambda tensor: tensor ^ 1)
    ((where, problem),) = verify_merge(stored, delta, merged).problems
    assert where == UNTRAINED and "is not trained, and 3,072 of 3,072 values" in problem


def test_base_and_delta_give_the_logits_of_a_proven_merge(case):
    base, delta, merged = case
    assert verify_merge(base, delta, merged).problems == []
    plain = AutoModelForCausalLM.from_pretrained(merged)
    tiny.assert_same(tiny.logits(plain), tiny.logits(from_delta(delta, base=base)))
