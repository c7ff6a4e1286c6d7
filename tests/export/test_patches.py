"""Weight patches, applied to the base and compared with merging."""

import math

import pytest
import quantised
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import convolution_grids, grids, some_blocks
from transformers import AutoModelForCausalLM
from weight_patches import apply_patches

from smt_trainer import SMTError, convert_to_smt, delta_patches, merge_checkpoint, model_patches, save_delta
from smt_trainer.export.weight_patch import WeightPatch, patches_of_blocks, patches_of_whole
from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.plain import plain_state_dict

WHOLE = {"modules_to_save": ["embed_tokens"], "train_norm": True}
CASES = {
    "llama": (tiny.llama, {}, {}),
    "whole modules": (tiny.llama, {}, WHOLE),
    "tied": (tiny.llama, {"tie_word_embeddings": True}, WHOLE),
    "transposed": (tiny.gpt2, {}, {"target_modules": "all-linear"}),
    "transposed and tied": (tiny.gpt2, {}, {"target_modules": "all-linear", "modules_to_save": ["wte"]}),
}


@pytest.fixture(params=CASES)
def make(request):
    """Return a function that makes a base, and the fields of a configuration."""
    build, sizes, fields = CASES[request.param]
    return lambda: build(**sizes), fields


def trained(make, dtype=torch.float32):
    """Return a model after a step, in a dtype."""
    build, fields = make
    model = build().to(dtype)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields)))
    tiny.step(model, **tiny.batch())
    return model


def same_patches(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.name, one.shape, one.dtype) == (other.name, other.shape, other.dtype)
        tiny.assert_same(one.values, other.values)
        tiny.assert_same(one.indices, other.indices)


@pytest.mark.parametrize("max_bytes", [16, 1000, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_patches_are_the_merged_checkpoint(dtype, max_bytes, make, tmp_path):
    model = trained(make, dtype)
    save_delta(model, tmp_path / "delta")
    make[0]().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    patches = list(delta_patches(tmp_path / "base", tmp_path / "delta", max_bytes=max_bytes))
    state = tiny.saved_tensors(tmp_path / "base")
    apply_patches(state, patches)
    tiny.assert_same(state, tiny.saved_tensors(tmp_path / "merged"))
    assert all(patch.size <= max_bytes for patch in patches)
    dense = [patch.indices is None for patch in patches]
    assert dense == sorted(dense)


def test_patches_of_a_model_are_those_of_its_delta_and_give_its_weights(make, tmp_path):
    model, base = trained(make, torch.bfloat16), make[0]().bfloat16()
    base.save_pretrained(tmp_path / "base")
    for _ in range(2):
        save_delta(model, tmp_path / "delta")
        patches = {patch.name: patch for patch in model_patches(model)}
        expected = {patch.name: patch for patch in delta_patches(tmp_path / "base", tmp_path / "delta")}
        assert patches.keys() == expected.keys()
        same_patches((patches[name] for name in expected), expected.values())
        # Weights that an earlier step has changed are set again.
        state = base.state_dict()
        apply_patches(state, patches.values())
        tiny.assert_same(dict(state), plain_state_dict(model))
        tiny.step(model, **tiny.batch())


def test_a_step_takes_as_many_bytes_as_computed(tmp_path):
    model = trained((tiny.llama, WHOLE), torch.bfloat16)
    blocks = model.smt_state.selection.trainable_parameters
    whole = sum(tensor.numel() for name, tensor in model.named_parameters() if "norm" in name or "embed" in name)
    for max_bytes in (1000, 2**20):
        patches = list(model_patches(model, max_bytes=max_bytes))
        cut = model.model.embed_tokens.weight.numel() if max_bytes == 1000 else 0
        assert sum(patch.size for patch in patches) == (blocks + cut) * (2 + 4) + (whole - cut) * 2
        assert {patch.indices.dtype for patch in patches if patch.indices is not None} == {torch.int32}


def test_what_is_stored_twice_is_patched_twice(tmp_path):
    model = tiny.llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=["embed_tokens"])))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    patches, state = list(delta_patches(tmp_path / "base", tmp_path / "delta")), tiny.saved_tensors(tmp_path / "base")
    apply_patches(state, patches)
    tiny.assert_same(state, tiny.saved_tensors(tmp_path / "merged"))
    assert {"lm_head.weight", "model.embed_tokens.weight"} < {patch.name for patch in patches}
    # A model has one such parameter, and a server ties it itself.
    assert "lm_head.weight" not in {patch.name for patch in model_patches(model)}


@given(
    some_blocks(grids() | convolution_grids()),
    st.integers(16, 200),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_patches_of_blocks_write_what_scattering_them_does(case, max_bytes, dtype):
    grid, block_indices = case
    blocks = torch.randn(len(block_indices), *grid.block_shape).to(dtype)
    weight, expected = torch.zeros(2, *grid.stored_shape, dtype=dtype)
    grid.scatter_(expected, block_indices, blocks)
    patches = list(patches_of_blocks("w", grid, block_indices, blocks, max_bytes))
    apply_patches({"w": weight}, patches)
    tiny.assert_same(weight, expected)
    places = torch.cat([patch.indices for patch in patches])
    assert len(places) == blocks.numel() and bool((places[1:] > places[:-1]).all())
    assert all(patch.size <= max_bytes for patch in patches)
    assert len(patches) == math.ceil(len(places) / (max_bytes // (dtype.itemsize + 4)))


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(16, 200), st.sampled_from([torch.float16, torch.int64]))
def test_patches_of_a_whole_tensor_write_it(shape, max_bytes, dtype):
    values = (torch.rand(shape) * 100).to(dtype)
    state = {"w": torch.zeros(shape, dtype=dtype)}
    apply_patches(state, patches_of_whole({"w": values}, max_bytes))
    tiny.assert_same(state["w"], values)


def test_large_tensors_have_indices_of_64_bits():
    for rows, dtype in ((2**16, torch.int32), (2**17, torch.int64)):
        grid = BlockGrid(rows, 2**15, 1, 1)
        corner = torch.tensor([[rows - 1, 2**15 - 1]])
        (patch,) = patches_of_blocks("w", grid, corner, torch.ones(1, 1, 1), 100)
        assert patch.indices.dtype == dtype and patch.indices.tolist() == [rows * 2**15 - 1]


def patch(values=(1.0, 2.0), indices=(0, 3), name="w", shape=(2, 3), dtype=torch.float32, kind=torch.int32):
    indices = indices if indices is None else torch.tensor(indices, dtype=kind)
    return WeightPatch(name, shape, dtype, torch.tensor(values, dtype=torch.float32), indices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": (1.0, math.nan)}, "got NaN, which would mean an unchanged value"),
        ({"values": (math.nan,) * 6, "indices": None}, "got NaN"),
        ({"indices": (3, 3)}, "ascending indices, each once"),
        ({"indices": (3, 0)}, "ascending indices, each once"),
        ({"indices": (-1, 3)}, "indices from 0 to 5, got -1 to 3"),
        ({"indices": (0, 6)}, "indices from 0 to 5, got 0 to 6"),
        ({"indices": (0,)}, r"1 values of torch\.float32 in one dimension, got torch\.float32 of \[2\]"),
        ({"indices": None}, "6 values"),
        ({"dtype": torch.bfloat16}, "values of torch.bfloat16"),
        ({"kind": torch.int16}, "indices of int32 or int64"),
    ],
)
def test_a_patch_that_no_server_may_apply_cannot_be_made(fields, message):
    with pytest.raises(SMTError, match=message):
        patch(**fields)


def test_integers_are_replaced_whole():
    values = torch.ones(1, dtype=torch.int64)
    with pytest.raises(SMTError, match="floats at indices"):
        WeightPatch("w", (2,), torch.int64, values, torch.tensor([1]))


@pytest.mark.parametrize("fields", [{"name": "v"}, {"shape": (3, 2)}, {"shape": (6,)}])
def test_nothing_is_written_if_one_patch_does_not_fit(fields):
    state = {"w": torch.zeros(2, 3)}
    with pytest.raises(SMTError, match="Use the base that the patches were made for"):
        apply_patches(state, [patch(), patch(**fields)])
    with pytest.raises(SMTError, match=r"here is torch\.float16"):
        apply_patches(state | {"h": torch.zeros(2, 3).half()}, [patch(), patch(name="h")])
    assert not state["w"].any()


def test_a_tensor_that_does_not_lie_row_by_row_is_patched():
    state = {"w": torch.zeros(3, 2).t()}
    apply_patches(state, [patch()])
    tiny.assert_same(state["w"], torch.tensor([[1.0, 0, 0], [2, 0, 0]]))


def test_a_diverged_model_is_not_sent(make):
    model = trained(make)
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).view(-1)[0] = math.nan
    with pytest.raises(SMTError, match="NaN"):
        list(model_patches(model))


def test_what_cannot_be_patched_is_refused(base, delta, tmp_path):
    folder, model = delta
    for make in (
        lambda **fields: delta_patches(base, folder, **fields),
        lambda **fields: model_patches(model, **fields),
    ):
        with pytest.raises(SMTError, match=r"max_bytes must be at least 16, .* got 15"):
            make(max_bytes=15)
    with pytest.raises(SMTError, match="replaces all quantised ones"):
        delta_patches(base, folder, onto="dequantized")
    with pytest.raises(SMTError, match="trains no blocks"):
        model_patches(tiny.llama())
    tiny.llama(seed=1).save_pretrained(base)
    with pytest.raises(SMTError, match="other values in"):
        delta_patches(base, folder)


def test_another_vocabulary_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    whole = tiny.config(score="random", modules_to_save=["embed_tokens", "lm_head"])
    convert_to_smt(model, tiny.choose(model, whole))
    save_delta(model, tmp_path / "delta")
    model.config.save_pretrained(tmp_path / "delta")
    with pytest.raises(SMTError, match="cannot change the shape of a tensor"):
        delta_patches(base, tmp_path / "delta")


def test_blocks_in_quantised_weights_are_refused_and_those_of_an_original_patched(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantised.load(base, "nf4")
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    with pytest.raises(SMTError, match="nothing to patch"):
        model_patches(model)
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged", onto="original")
    state = tiny.saved_tensors(base)
    apply_patches(state, delta_patches(base, tmp_path / "delta", onto="original"))
    tiny.assert_same(state, tiny.saved_tensors(tmp_path / "merged"))
