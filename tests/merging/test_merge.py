"""Merging on disk, compared with merging in memory."""

import json
import os
import stat
import subprocess
import sys

import pytest
import tiny
import torch
from architectures import inputs_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, merge_and_unload, merge_checkpoint, save_delta
from smt_trainer.files import new_folder
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE

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


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merged_checkpoint_computes_what_the_trained_model_does(dtype, master, tmp_path):
    tiny.llama().to(dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", train_norm=True, master_dtype="float64")))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "delta", master=master)
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype and torch.equal(tiny.logits(merged), tiny.logits(model))


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
    assert "trained on bfloat16 weights and is merged into float32 ones" in warnings()[0]


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
    return r"the delta in .* expects `.*` of .* to have shape \[(64|32), 64\], got \[.*, 96\]"


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
    with pytest.raises(SMTError, match="it is not a folder, and could not be fetched"):
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
    monkeypatch.setattr("smt_trainer.merging.plan.MergePlan.write", no_space)
    with pytest.raises(OSError, match="disk full"):
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}


# ---- where files lie ----


NAMES = [
    *(
        "../outside.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.bin",
        "a\\b.safetensors",
    ),
    *("a\x1b[2J.safetensors", "a\0.safetensors", 7, None, ["model.safetensors"]),
]


@pytest.mark.parametrize("name", [*NAMES, "absolute"])
def test_only_plain_names_of_shards_are_read_and_written(name, base, delta, tmp_path):
    (base / SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    if name == "absolute":
        name = str(tmp_path / "outside.safetensors")
    keys = load_file(tmp_path / "outside.safetensors")
    (base / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    before = tiny.all_files(tmp_path)
    with pytest.raises(SMTError, match=r"Expected the plain name of a \.safetensors file") as refusal:
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert tiny.all_files(tmp_path) == before and str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "place", ["base", "base/merged", "base/a/merged", "delta/merged", "link", "dangling", "linked/new"]
)
def test_an_output_in_the_base_or_behind_a_link_is_refused_before_the_work(place, base, delta, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("base")
    before = tiny.all_files(tmp_path)
    with pytest.raises(SMTError, match=r"lies in|is a link|is not empty"):
        merge_checkpoint(base, delta[0], tmp_path / place)
    assert tiny.all_files(tmp_path) == before and not (tmp_path / "nowhere").exists()


def test_a_base_behind_a_link_is_read(base, delta, tmp_path):
    (tmp_path / "link").symlink_to("base")
    merge_checkpoint(tmp_path / "link", delta[0], tmp_path / "merged")
    merge_checkpoint(base, delta[0], tmp_path / "again")
    assert tiny.all_files(tmp_path / "merged") == tiny.all_files(tmp_path / "again")


def test_of_one_file_and_an_index_the_file_is_read_as_transformers_does(base, delta, tmp_path):
    merge_checkpoint(base, delta[0], tmp_path / "expected")
    tiny.llama(seed=3).save_pretrained(tmp_path / "other", max_shard_size="40KB")
    for path in (tmp_path / "other").glob("model*"):
        path.rename(base / path.name)
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert tiny.all_files(tmp_path / "merged") == tiny.all_files(tmp_path / "expected")
    merged, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "expected"))
    assert torch.equal(tiny.logits(merged), tiny.logits(expected))


def test_the_umask_sets_the_modes_of_the_merged_files(base, delta, tmp_path):
    umask = os.umask(0o027)
    try:
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "merged").iterdir()} == {0o640}


def test_what_a_killed_merge_left_is_used_up_by_the_next(base, delta, tmp_path):
    stage = tmp_path / ".merged.partial"
    (stage / "half").mkdir(parents=True)
    (stage / SINGLE_FILE).write_bytes(b"half")
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta", "merged"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in base.iterdir()}


def test_two_merges_into_one_folder_are_noticed_before_the_work(base, delta, tmp_path):
    with new_folder(tmp_path / "merged") as stage:
        (stage / "file").write_text("of the first")
        with pytest.raises(SMTError, match=r"another process is writing .*merged"):
            merge_checkpoint(base, delta[0], tmp_path / "merged")
        assert (stage / "file").read_text() == "of the first"
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["file"]


# ---- bytes ----


def write_unaligned(path):
    """Write a safetensors file again with a header whose length is odd."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert len(header) % 2


@pytest.mark.parametrize("aligned", [True, False])
def test_header_and_all_bytes_outside_the_blocks_are_those_of_the_base(aligned, base, delta, tmp_path):
    if not aligned:
        write_unaligned(base / SINGLE_FILE)
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    before, after = ((folder / SINGLE_FILE).read_bytes() for folder in (base, tmp_path / "merged"))
    header = 8 + int.from_bytes(before[:8], "little")
    assert len(before) == len(after) and before[:header] == after[:header]
    trained = delta[1].smt_state.selection.trainable_parameters
    expected, found = merge_and_unload(delta[1]).state_dict(), load_file(tmp_path / "merged" / SINGLE_FILE)
    assert found.keys() == load_file(base / SINGLE_FILE).keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    assert 0 < changed <= 4 * trained


def header_of(base):
    data = (base / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


FIRST = "model.layers.0.self_attn.q_proj.weight"


def overlapping(header):
    header[FIRST]["data_offsets"] = header["model.layers.0.self_attn.o_proj.weight"]["data_offsets"]


@pytest.mark.parametrize(
    "change",
    [
        overlapping,
        lambda header: header[FIRST].update(data_offsets=[-64, -32]),
        lambda header: header[FIRST].update(data_offsets=[0, 10**30]),
        lambda header: header[FIRST].update(data_offsets=["a", "b"]),
        lambda header: header[FIRST].update(shape=[64.0, 64]),
        lambda header: header[FIRST].update(shape=64),
        lambda header: header[FIRST].update(shape=[2**40, 2**40]),
        lambda header: header[FIRST].update(dtype="F8_E4M3"),
        lambda header: header[FIRST].update(dtype=["F32"]),
        lambda header: header.pop(FIRST),
        lambda header: header.update({FIRST: 7}),
    ],
)
def test_a_base_with_an_odd_header_is_refused_and_nothing_written(change, base, delta, tmp_path):
    header, data = header_of(base)
    change(header)
    text = json.dumps(header).encode()
    (base / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(SMTError):
        merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}


def test_merging_imports_no_torch(base, delta, tmp_path):
    script = """import sys; from smt_trainer.cli import main
assert main(sys.argv[1:]) == 0
print(*{'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules))"""
    command = [sys.executable, "-c", script, "merge", str(base), str(delta[0]), str(tmp_path / "merged")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"merged checkpoint in {tmp_path / 'merged'}", ""]
    assert run.stderr.splitlines() == [f"{SINGLE_FILE} is merged (1 of 1)."]


# ---- tied weights ----


@pytest.fixture
def tied(tmp_path):
    """Train the tied embeddings of a model; return its base on disk, its delta and what it has become."""
    model = tiny.llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=["embed_tokens"])))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "delta")
    return tmp_path / "base", tmp_path / "delta", merge_and_unload(model)


def store_both(base, change=0.0):
    weights = load_file(base / SINGLE_FILE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
    save_file(weights, base / SINGLE_FILE, metadata={"format": "pt"})


def set_tie(base, value):
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (base / "config.json").write_text(json.dumps(config if value is None else config | {"tie_word_embeddings": value}))


@pytest.mark.parametrize("said", [True, None])
def test_a_tied_weight_that_is_stored_twice_is_updated_twice(said, tied, tmp_path):
    base, delta, trained = tied
    store_both(base)
    set_tie(base, said)
    merge_checkpoint(base, delta, tmp_path / "merged")
    found = tiny.saved_tensors(tmp_path / "merged")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[key], trained.lm_head.weight)
    if said:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(tiny.logits(merged), tiny.logits(trained))


@pytest.mark.parametrize(("said", "change"), [(False, 0.0), (True, 1.0)])
def test_a_head_of_its_own_keeps_its_values(said, change, tied, tmp_path):
    base, delta, trained = tied
    store_both(base, change)
    set_tie(base, said)
    merge_checkpoint(base, delta, tmp_path / "merged")
    before, after = tiny.saved_tensors(base), tiny.saved_tensors(tmp_path / "merged")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], trained.model.embed_tokens.weight)
