"""The delta on disk: round trip, base check, damage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from architectures import inputs_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_trainer import (
    SMTError,
    applied,
    convert_to_smt,
    from_delta,
    load_delta,
    merge_and_unload,
    merge_checkpoint,
    save_delta,
)
from smt_trainer.arrays import as_array
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST, MANIFEST_FILE, Delta
from smt_trainer.delta.put import put_delta
from smt_trainer.manifest import CHECKSUM, sealed
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import is_smt_model


def no_space(*_, **__) -> None:
    """Stand in for a function that writes a file."""
    raise OSError("disk full")


def test_base_and_delta_give_the_trained_models_logits(delta):
    folder, trained = delta
    expected = tiny.logits(trained)
    assert not torch.equal(tiny.logits(tiny.llama()), expected)
    for merge in (False, True):
        model = load_delta(tiny.llama(), folder, merge=merge)
        assert is_smt_model(model) is not merge
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_the_delta_of_a_model_with_transposed_weights_gives_its_logits(granularity, tmp_path):
    shape = {} if granularity == "block" else {"granularity": granularity, "block_size": "auto"}
    model = tiny.gpt2()
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", target_modules="all-linear", **shape)))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path)
    assert Delta.load(tmp_path).selection.grids == model.smt_state.selection.grids
    assert torch.equal(tiny.logits(load_delta(tiny.gpt2(), tmp_path, merge=True)), tiny.logits(model))


def test_loading_restores_every_tensor_of_the_trained_model(delta):
    folder, trained = delta
    state = load_delta(tiny.llama(), folder).state_dict()
    assert state.keys() == trained.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())


def test_a_delta_can_be_loaded_into_the_model_that_trains_its_blocks(delta):
    folder, trained = delta
    expected = tiny.logits(trained)
    tiny.step(trained, **tiny.batch())
    assert not torch.equal(tiny.logits(trained), expected)
    assert torch.equal(tiny.logits(load_delta(trained, folder)), expected)


def test_a_delta_in_memory_stays_as_it_is_when_the_model_trains_on(tmp_path):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", train_norm=True)))
    delta, expected = Delta.of(model), tiny.logits(model)
    tiny.step(model.train(), **tiny.batch())
    assert not torch.equal(tiny.logits(model), expected)
    with applied(model, delta):
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("master", [False, True])
def test_blocks_are_stored_in_the_weights_dtype_or_the_masters(master, tmp_path):
    model = tiny.llama().bfloat16()
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path, master=master)
    stored = Delta.load(tmp_path)
    assert {blocks.dtype for blocks in stored.blocks.values()} == {torch.float32 if master else torch.bfloat16}
    assert stored.weight_dtype == "bfloat16"
    again = load_delta(tiny.llama().bfloat16(), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    if master:
        for (_, ours), (_, theirs) in zip(block_modules(again), block_modules(model), strict=True):
            assert torch.equal(ours.blocks, theirs.blocks)


def test_the_delta_folder_holds_two_files_of_plain_data(delta):
    folder, model = delta
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_FILE, DELTA_FILE]
    stored = sum(blocks.numel() for name, blocks in load_file(folder / DELTA_FILE).items() if name.endswith(".blocks"))
    assert stored == model.smt_state.selection.trainable_parameters


def test_saving_again_replaces_the_delta(delta):
    folder, model = delta
    tiny.step(model, **tiny.batch())
    save_delta(model, folder)
    assert torch.equal(tiny.logits(load_delta(tiny.llama(), folder)), tiny.logits(model))


def test_the_delta_holds_the_head_of_a_classifier(tmp_path):
    model, base = (tiny.build("BertForSequenceClassification", num_labels=3) for _ in range(2))
    inputs = inputs_of(model)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **inputs)
    save_delta(model, tmp_path)
    assert sorted(Delta.load(tmp_path).whole) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(tiny.logits(load_delta(base, tmp_path), **inputs), tiny.logits(model, **inputs))

    other = tiny.build("BertForSequenceClassification", num_labels=2)
    with pytest.raises(SMTError, match=r"holds `classifier\..*Load the base with the same head \(number of labels\)"):
        load_delta(other, tmp_path)
    assert not is_smt_model(other)


def test_the_delta_holds_tied_modules_trained_whole_and_they_stay_tied(tmp_path):
    smt_config = tiny.config(score="random", modules_to_save=["embed_tokens", "lm_head"])
    model = tiny.llama(tie_word_embeddings=True)
    convert_to_smt(model, tiny.choose(model, smt_config))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path)
    again = load_delta(tiny.llama(tie_word_embeddings=True), tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_from_delta_loads_base_and_delta_in_one_line(base, delta):
    folder, trained = delta
    model = from_delta(folder, base=str(base))
    assert not is_smt_model(model) and torch.equal(tiny.logits(model), tiny.logits(trained))
    assert is_smt_model(from_delta(folder, base=str(base), merge=False))
    with pytest.raises(SMTError, match="records no base model; pass base="):
        from_delta(folder)


@pytest.mark.parametrize("base", ["/nowhere", "./nowhere", "../nowhere", "~/nowhere", "runs/llama/base"])
def test_a_path_at_which_there_is_no_base_is_refused_saying_who_named_it(base, delta):
    folder, _ = delta
    with pytest.raises(SMTError, match=rf"^there is no folder at {base}, the base that you gave\. Check base="):
        from_delta(folder, base=base)
    edit(folder, lambda manifest: manifest["selection"].update(base_model=base))
    with pytest.raises(SMTError, match=rf"folder at {base}, the base that the delta in {folder} names\. Pass base="):
        from_delta(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.llama(seed=1), "other values in"),
        (lambda: tiny.llama(num_hidden_layers=1), "this model has no such module"),
        (
            lambda: tiny.build("LlamaForCausalLM", hidden_size=96, num_key_value_heads=4),
            "64x64; this model has .* 96x96",
        ),
        (lambda: tiny.llama().bfloat16(), "in float32 or a finer dtype"),
    ],
)
def test_a_delta_of_another_base_is_refused_and_the_model_left_as_it_was(make, message, delta):
    model = make()
    before = tiny.weights(model)
    with pytest.raises(SMTError, match=message):
        load_delta(model, delta[0])
    assert not is_smt_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _bfloat16_base(llama, folder, cast):
    """Write a base in bfloat16; return it loaded, with some of its modules in float32."""
    llama.bfloat16().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name in cast:
        model.get_submodule(name).float()
    return model


@pytest.mark.parametrize(
    "cast, fields, rounded",
    [
        (["lm_head"], {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        (["model.norm"], {"train_norm": True}, "model.norm.weight"),
        (["model.layers.1.self_attn"], {}, "model.layers.1.self_attn.q_proj"),
        (["lm_head", "model.norm", "model.layers.1.mlp"], {}, None),
    ],
    ids=["head", "norm", "blocks", "none"],
)
def test_what_was_trained_in_a_finer_dtype_than_the_base_has_is_named(cast, fields, rounded, llama, tmp_path, caplog):
    model = _bfloat16_base(llama, tmp_path / "base", cast)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", scope="per_module", budget=2, **fields)))
    tiny.disturb(model)
    save_delta(model, tmp_path / "delta")
    for way in (
        lambda: from_delta(tmp_path / "delta", base=str(tmp_path / "base")),
        lambda: merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged"),
    ):
        caplog.clear()
        way()
        assert ("not exactly the trained model" in caplog.text) == (rounded is not None)
        assert rounded is None or f"`{rounded}` from float32, its dtype in training, to bfloat16" in caplog.text
    caplog.clear()
    again = load_delta(_bfloat16_base(llama, tmp_path / "again", cast), tmp_path / "delta", merge=True)
    assert not caplog.text
    tiny.assert_same(dict(again.state_dict()), dict(merge_and_unload(model).state_dict()))


def test_masters_of_a_checkpoint_are_rounded_as_in_training(llama, tmp_path, caplog):
    model = _bfloat16_base(llama, tmp_path / "base", [])
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random")))
    tiny.disturb(model)
    save_delta(model, tmp_path / "delta", master=True)
    loaded = from_delta(tmp_path / "delta", base=str(tmp_path / "base"))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model)) and not caplog.text


def test_either_name_of_the_dtype_is_heard(delta, base):
    for name in ("dtype", "torch_dtype"):
        assert from_delta(delta[0], base=str(base), **{name: torch.float64}).dtype == torch.float64


def test_a_finer_dtype_is_the_same_base(delta):
    folder, trained = delta
    model = load_delta(tiny.llama().double(), folder)
    torch.testing.assert_close(tiny.logits(model).float(), tiny.logits(trained), rtol=1e-5, atol=1e-5)


def test_another_name_of_the_same_weights_gives_a_warning(delta, warnings):
    folder, _ = delta
    edit(folder, lambda manifest: manifest["selection"].update(base_model="someone/base@abc"))
    model = tiny.llama()
    model.config._name_or_path = "someone/copy"
    load_delta(model, folder)
    assert warnings() == [
        "The delta names someone/base@abc as its base. This model is someone/copy; the weights agree."
    ]


def test_a_delta_of_other_blocks_is_refused_by_a_rewritten_model(delta):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model, seed=1))
    with pytest.raises(SMTError, match="holds other blocks"):
        load_delta(model, delta[0])


def rewrite(folder, tensors=None, manifest=None, seal=True) -> None:
    """Replace the tensors or the manifest of a delta, with or without a checksum that fits."""
    tensors = load_file(folder / DELTA_FILE) if tensors is None else tensors
    manifest = json.loads((folder / MANIFEST_FILE).read_text()) if manifest is None else manifest
    if seal and isinstance(manifest, dict):
        manifest.pop(CHECKSUM, None)
        manifest = sealed(manifest, {name: as_array(tensor) for name, tensor in tensors.items()})
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    save_file(tensors, folder / DELTA_FILE, metadata={"format": "pt", MANIFEST: text})


def edit(folder, change, seal=True) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    rewrite(folder, manifest=manifest, seal=seal)


def edit_tensors(folder, change, seal=True) -> None:
    tensors = load_file(folder / DELTA_FILE)
    name = next(name for name in tensors if name.endswith(".block_indices")).removesuffix(".block_indices")
    change(tensors, name)
    rewrite(folder, tensors, seal=seal)


def edit_both(folder, change) -> None:
    tensors, manifest = load_file(folder / DELTA_FILE), json.loads((folder / MANIFEST_FILE).read_text())
    change(tensors, manifest)
    rewrite(folder, tensors, manifest)


def whole(name, **fields):
    """Add a tensor that the manifest names as well, and change the configuration."""

    def change(tensors, manifest):
        tensors[name] = torch.zeros(64, 64)
        manifest["whole"] = sorted([*manifest["whole"], name])
        manifest["selection"]["config"].update(fields)

    return lambda folder: edit_both(folder, change)


def set_config(**fields):
    return lambda folder: edit(folder, lambda manifest: manifest["selection"]["config"].update(fields))


def cast(part, dtype):
    def change(tensors, name):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"].to(dtype)

    return lambda folder: edit_tensors(folder, change)


def set_value(value):
    return lambda folder: edit_tensors(folder, lambda tensors, name: tensors[f"{name}.blocks"][0, 0, 0].fill_(value))


def truncate(folder):
    data = (folder / DELTA_FILE).read_bytes()
    (folder / DELTA_FILE).write_bytes(data[: len(data) // 2])


def set_index(value):
    return lambda tensors, name: tensors[f"{name}.block_indices"][0].fill_(value)


def repeat_index(tensors, name):
    tensors[f"{name}.block_indices"] = tensors[f"{name}.block_indices"][:1].repeat(2, 1)
    tensors[f"{name}.blocks"] = tensors[f"{name}.blocks"][:1].repeat(2, 1, 1)


def flatten_indices(tensors, name):
    tensors[f"{name}.block_indices"] = tensors[f"{name}.block_indices"].flatten()


def drop_a_block(tensors, name):
    tensors[f"{name}.blocks"] = tensors[f"{name}.blocks"][:-1].contiguous()


def reshape_blocks(tensors, name):
    tensors[f"{name}.blocks"] = tensors[f"{name}.blocks"][:, :8].contiguous()


def add_a_tensor(tensors, name):
    tensors["stranger"] = torch.zeros(1)


DAMAGE = {
    "no folder": (lambda folder: folder.rename(folder.with_name("away")), r"no delta at .*: it is not a folder"),
    "no tensors": (lambda folder: (folder / DELTA_FILE).unlink(), f"{DELTA_FILE} is missing"),
    "no manifest": (
        lambda folder: save_file(load_file(folder / DELTA_FILE), folder / DELTA_FILE),
        "it has no manifest",
    ),
    "truncated": (truncate, "is damaged or truncated"),
    "empty": (lambda folder: (folder / DELTA_FILE).write_bytes(b""), "is damaged or truncated"),
    "text": (lambda folder: (folder / DELTA_FILE).write_text("weights"), "is damaged or truncated"),
    "no JSON": (lambda folder: rewrite(folder, manifest='{"format": '), "is damaged"),
    "a list": (lambda folder: rewrite(folder, manifest="[]"), "is damaged"),
    "newer": (lambda folder: edit(folder, lambda values: values.update(format="3")), "has format 3, this version"),
    "no fingerprint": (lambda folder: edit(folder, lambda values: values.pop("fingerprint")), "is damaged"),
    "wrong dtype": (lambda folder: edit(folder, lambda values: values.update(weight_dtype="f99")), "is damaged"),
    "unknown field": (
        lambda folder: edit(folder, lambda values: values["selection"]["config"].update(edge=3)),
        "has no field edge",
    ),
    "index too large": (lambda folder: edit_tensors(folder, set_index(99)), r"block \(99, 99\) was asked for"),
    "index negative": (lambda folder: edit_tensors(folder, set_index(-1)), r"block \(-1, -1\) was asked for"),
    "index twice": (lambda folder: edit_tensors(folder, repeat_index), "name a block twice"),
    "indices flat": (lambda folder: edit_tensors(folder, flatten_indices), "is damaged"),
    "block missing": (lambda folder: edit_tensors(folder, drop_a_block), "is damaged"),
    "blocks of other shape": (lambda folder: edit_tensors(folder, reshape_blocks), "should have shape"),
    "int blocks": (cast("blocks", torch.int32), "are int32; expected float32"),
    "half blocks": (cast("blocks", torch.float16), "are float16; expected float32"),
    "float indices": (cast("block_indices", torch.float32), r"must be int32 of shape \[n, 2\], got float32"),
    "long indices": (cast("block_indices", torch.int64), "must be int32"),
    "NaN": (set_value(float("nan")), "are not all finite"),
    "infinite": (set_value(float("-inf")), "are not all finite"),
    "another weight": (whole("lm_head.weight"), "holds `lm_head.weight`, which this model does not train"),
    "explained by nothing": (
        whole("lm_head.weight", modules_to_save=["norm"]),
        "holds `lm_head.weight` whole, which its configuration does not train",
    ),
    "a target as whole": (
        lambda folder: whole(f"{next(iter(Delta.load(folder).blocks))}.weight")(folder),
        "whole, which its configuration does not train",
    ),
    "dropped from both": (set_config(train_norm=True), "holds no tensor that train_norm=True trains whole"),
    "unknown master": (set_config(master_dtype="int8"), "master_dtype must be one of"),
    "master of no type": (set_config(master_dtype=["float32"]), "master_dtype must be one of"),
    "a selection within": (set_config(selection="elsewhere.json"), "must have no selection of its own"),
    "dtype of no float": (
        lambda folder: edit(folder, lambda values: values.update(weight_dtype="int8")),
        "must be one",
    ),
    "larger than its model": (
        lambda folder: edit(folder, lambda values: values["selection"].update(num_parameters=100)),
        "cover .* weights of a model of 100 parameters",
    ),
    "parameters as text": (
        lambda folder: edit(folder, lambda values: values["selection"].update(num_parameters="many")),
        "is damaged",
    ),
    "base of no text": (
        lambda folder: edit(folder, lambda values: values["selection"].update(base_model=7)),
        "base_model must be a name or null, got int",
    ),
    "unknown key": (lambda folder: edit(folder, lambda values: values.update(extra=1)), "missing or unknown"),
    "checksum of nothing": (
        lambda folder: edit(folder, lambda values: values.update({CHECKSUM: None}), seal=False),
        "does not have the checksum",
    ),
    "escape sequence": (
        lambda folder: edit(folder, lambda values: values.update(architecture="\x1b[2J")),
        "should name an architecture",
    ),
    "no checksum": (lambda folder: edit(folder, lambda values: values.pop(CHECKSUM), seal=False), "has no checksum"),
    "stranger": (lambda folder: edit_tensors(folder, add_a_tensor), "expected the whole tensors"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_delta_is_refused_and_the_model_left_as_it_was(damage, message, delta, llama):
    damage(delta[0])
    with pytest.raises(SMTError, match=message):
        load_delta(llama, delta[0])
    assert not is_smt_model(llama) and all(parameter.requires_grad for parameter in llama.parameters())


def swap_blocks(tensors, name):
    several = next(key for key, found in tensors.items() if key.endswith(".blocks") and len(found) > 1)
    tensors[several] = tensors[several].flip(0).contiguous()


def flip_a_bit(tensors, name):
    tensors[f"{name}.blocks"].view(torch.uint8)[0, 3, 5] ^= 1


def zero_blocks(tensors, name):
    tensors[f"{name}.blocks"].zero_()


@pytest.mark.parametrize("change", [swap_blocks, flip_a_bit, zero_blocks, set_index(0)])
def test_values_that_are_not_those_saved_are_refused(change, delta):
    edit_tensors(delta[0], change, seal=False)
    with pytest.raises(SMTError, match="does not have the checksum that was saved with it"):
        Delta.load(delta[0])


def test_a_manifest_that_is_not_the_one_saved_is_refused(delta):
    edit(delta[0], lambda values: values["selection"].update(base_model="someone/else"), seal=False)
    with pytest.raises(SMTError, match="does not have the checksum that was saved with it"):
        Delta.load(delta[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved_and_the_older_delta_stays(value, delta):
    folder, model = delta
    before = (folder / DELTA_FILE).read_bytes()
    with torch.no_grad():
        next(linear for _, linear in block_modules(model)).blocks[0, 0, 0] = value
    with pytest.raises(SMTError, match=r"are not all finite\. If training diverged"):
        save_delta(model, folder)
    assert (folder / DELTA_FILE).read_bytes() == before


def test_a_model_of_several_dtypes_keeps_its_values(tmp_path):
    model = tiny.llama()
    model.model.layers[1].bfloat16()
    selection = tiny.choose(model)
    convert_to_smt(model, selection)
    save_delta(model, tmp_path)
    stored = Delta.load(tmp_path)
    for name, linear in block_modules(model):
        assert torch.equal(stored.blocks[name], linear.blocks[linear.row_major_order()])


def test_the_code_of_a_base_that_the_delta_names_is_not_run(delta, monkeypatch):
    folder, _ = delta
    edit(folder, lambda manifest: manifest["selection"].update(base_model="author/model"))
    with pytest.raises(SMTError, match=r"author would decide whose code runs. Pass base= yourself"):
        from_delta(folder, trust_remote_code=True)


def test_what_a_terminal_would_obey_is_escaped(delta):
    edit(delta[0], lambda manifest: manifest["selection"].update(base_model="\x1b[2Jbase\u202e"))
    assert Delta.load(delta[0]).selection.base_model == r"\x1b[2Jbase\u202e"
    name = "model.\x1b[2J"
    edit(
        delta[0],
        lambda manifest: manifest["selection"]["modules"].update(
            {name: next(iter(manifest["selection"]["modules"].values()))}
        ),
    )
    with pytest.raises(SMTError) as refusal:
        Delta.load(delta[0])
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("rows", [70, 50])
@pytest.mark.parametrize("tied", [False, True])
def test_a_refused_delta_of_another_vocabulary_leaves_the_model_as_it_was(tied, rows, tmp_path):
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model, base = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    model.resize_token_embeddings(rows)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=names)))
    stored = Delta.of(model)
    odd = replace(stored, whole_arrays=stored.whole_arrays | {"model.embed_tokens.bias": np.zeros(rows)})
    before, shapes = tiny.weights(base), repr(base)
    with pytest.raises(SMTError, match=r"holds `model\.embed_tokens\.bias` of shape .*; this model has none"):
        put_delta(base, odd)
    assert repr(base) == shapes and base.config.vocab_size == 64 and not is_smt_model(base)
    tiny.assert_same(dict(base.state_dict()), before)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    put_delta(base, stored)
    assert torch.equal(tiny.logits(base), tiny.logits(model))


def test_saving_a_plain_model_is_refused(llama, tmp_path):
    with pytest.raises(SMTError, match="trains no blocks"):
        save_delta(llama, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_failed_save_leaves_the_older_delta_whole(delta, monkeypatch):
    folder, model = delta
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("smt_trainer.delta.delta.save_arrays", no_space)
    with pytest.raises(OSError, match="disk full"):
        save_delta(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_interrupted_between_the_files_leaves_a_whole_delta(delta, llama, monkeypatch, tmp_path):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model, seed=1))
    monkeypatch.setattr("smt_trainer.delta.delta.write_text", no_space)
    with pytest.raises(OSError, match="disk full"):
        save_delta(model, delta[0])
    assert torch.equal(tiny.logits(load_delta(llama, delta[0])), tiny.logits(model))
