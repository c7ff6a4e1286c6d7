"""Merging on disk, compared with merging in memory."""

import json

import pytest
import tiny
import torch
from architectures import inputs_of
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, merge_and_unload, merge_checkpoint, save_delta
from smt_trainer.delta.merge import INDEX_FILE, SINGLE_FILE

SHARDING = {"one file": "1GB", "shards": "40KB"}


def no_space(*_, **__) -> None:
    """Stand in for a function that writes a file."""
    raise OSError("disk full")


@pytest.mark.parametrize("size", SHARDING.values(), ids=SHARDING)
def test_merging_on_disk_equals_merging_in_memory_tensor_for_tensor(size, delta, tmp_path):
    folder, trained = delta
    base, merged = tmp_path / "base", tmp_path / "merged"
    tiny.llama().save_pretrained(base, max_shard_size=size)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    assert merge_checkpoint(base, folder, merged) == merged
    merge_and_unload(trained).save_pretrained(tmp_path / "expected", max_shard_size=size)

    expected = tiny.saved_tensors(tmp_path / "expected")
    written = tiny.saved_tensors(merged)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, written[key]) for key, tensor in expected.items())
    for (name, (metadata, shard)), (same, (kept, part)) in zip(
        tiny.saved_files(base).items(), tiny.saved_files(merged).items(), strict=True
    ):
        assert (name, metadata, list(shard)) == (same, kept, list(part))
        assert {tensor.dtype for tensor in shard.values()} == {tensor.dtype for tensor in part.values()}
    other_files = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in merged.iterdir()} == other_files and (INDEX_FILE in other_files) == (size != "1GB")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(merged)), tiny.logits(trained))


def test_only_the_blocks_of_the_base_are_changed(base, delta, tmp_path):
    folder, trained = delta
    selection = trained.smt_state.selection
    merge_checkpoint(base, folder, tmp_path / "merged")
    before, after = tiny.saved_tensors(base), tiny.saved_tensors(tmp_path / "merged")
    for key, tensor in before.items():
        grid = selection.grids.get(key.removesuffix(".weight"))
        changed = (tensor != after[key]).nonzero()
        if grid is None:
            assert not len(changed)
        else:
            blocks = {(row // grid.block_rows, column // grid.block_columns) for row, column in changed.tolist()}
            chosen = selection.block_indices.get(key.removesuffix(".weight"), torch.empty(0, 2)).tolist()
            assert blocks <= set(map(tuple, chosen))


def test_a_merged_checkpoint_is_refused_as_base_of_the_same_delta(base, delta, tmp_path):
    merge_checkpoint(base, delta[0], tmp_path / "once")
    with pytest.raises(SMTError, match="other values in"):
        merge_checkpoint(tmp_path / "once", delta[0], tmp_path / "twice")


def test_merging_twice_writes_the_same_bytes(base, delta, tmp_path):
    first, second = (merge_checkpoint(base, delta[0], tmp_path / name) for name in ("first", "second"))
    assert (first / SINGLE_FILE).read_bytes() == (second / SINGLE_FILE).read_bytes()


def test_the_head_of_a_classifier_is_merged(tmp_path):
    model = tiny.build("BertForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **inputs_of(model))
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(model))


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.transformer], ids=["whole", "no prefix"])
def test_transposed_weights_are_merged(part, tmp_path):
    model = tiny.gpt2()
    part(model).save_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", target_modules="all-linear")))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path / "merged")), tiny.logits(model))


def test_a_checkpoint_without_the_prefix_of_its_base_model_is_merged(delta, tmp_path):
    tiny.llama().model.save_pretrained(tmp_path / "base")
    assert "layers.0.self_attn.q_proj.weight" in tiny.saved_tensors(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", delta[0], tmp_path / "merged")
    expected = merge_and_unload(delta[1]).model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tiny.saved_tensors(tmp_path / "merged").items())


def test_merging_into_another_dtype_gives_a_warning(tmp_path, warnings):
    model = tiny.llama().bfloat16()
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    tiny.llama().save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert "trained on torch.bfloat16 and is merged into torch.float32" in warnings()[0]


def no_safetensors(base):
    (base / SINGLE_FILE).unlink()
    return "Convert the base to safetensors first"


def another_base(base):
    tiny.llama(seed=1).save_pretrained(base)
    return "other values in"


def fewer_layers(base):
    tiny.llama(num_hidden_layers=1).save_pretrained(base)
    return r"has no tensor `model\.layers\.1"


def wider(base):
    tiny.build("LlamaForCausalLM", hidden_size=96, num_key_value_heads=4).save_pretrained(base)
    return r"the delta expects `.*` of .* to have shape \[(64|32), 64\], got \[.*, 96\]"


def truncated_base(base):
    data = (base / SINGLE_FILE).read_bytes()
    (base / SINGLE_FILE).write_bytes(data[: len(data) // 2])
    return "damaged or truncated"


def damaged_index(base):
    (base / SINGLE_FILE).unlink()
    (base / INDEX_FILE).write_text("{")
    return "is not valid JSON"


def missing_shard(base):
    with safe_open(base / SINGLE_FILE, "pt") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "model-00001-of-00002.safetensors")}
    (base / SINGLE_FILE).unlink()
    (base / INDEX_FILE).write_text(json.dumps(index))
    return "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "damage", [no_safetensors, another_base, fewer_layers, wider, truncated_base, damaged_index, missing_shard]
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_written(damage, base, delta, tmp_path):
    message = damage(base)
    with pytest.raises(SMTError, match=message):
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}


def test_a_base_that_is_neither_a_folder_nor_on_the_hub_is_refused(delta, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SMTError, match="is not a folder and could not be fetched from the hub"):
        merge_checkpoint("someone/nothing", delta[0], tmp_path / "merged")


@pytest.mark.parametrize("as_file", [True, False])
def test_an_output_that_exists_is_refused_and_kept(as_file, base, delta, tmp_path):
    output = tmp_path / "output"
    kept = output if as_file else output / "precious.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(SMTError, match="exists and is not empty; give a new folder"):
        merge_checkpoint(base, delta[0], output)
    assert kept.read_text() == "precious"


def test_an_empty_output_folder_is_used(base, delta, tmp_path):
    (tmp_path / "merged").mkdir()
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert (tmp_path / "merged" / SINGLE_FILE).is_file()


def test_a_crash_in_the_middle_leaves_no_output(base, delta, tmp_path, monkeypatch):
    monkeypatch.setattr("smt_trainer.delta.merge.save_file", no_space)
    with pytest.raises(OSError, match="disk full"):
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}
