"""Deltas of experts on checkpoints that store them together, one by one, or transposed."""

import pytest
import tiny
import torch
from architectures import EXPERTS, GROUPED
from families import FAMILIES
from round_trips import assert_composed_and_unmerged_exactly, assert_patches_merge
from safetensors.torch import save_file
from weight_patches import apply_patches

from smt_trainer import (
    Delta,
    SMTError,
    applied,
    compose_deltas,
    from_delta,
    merge_and_unload,
    merge_checkpoint,
    verify_merge,
)
from smt_trainer.export.lora import export_lora
from smt_trainer.export.patches import model_patches
from smt_trainer.sparse.convert import convert_to_smt

LOCAL = GROUPED | {"num_local_experts": 4}
# Overrides, the block size, and the tensors of expert 1 that its blocks lie in.
STORED = {
    "Qwen3MoeForCausalLM": (
        GROUPED | EXPERTS | {"num_experts": 4},
        16,
        {f"mlp.experts.1.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
    ),
    # One block row covers the gate and the up projection, 32 rows each.
    "OlmoeForCausalLM": (
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
        (64, 32),
        {f"mlp.experts.1.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
    ),
    "MixtralForCausalLM": (LOCAL, 32, {f"block_sparse_moe.experts.1.{name}.weight" for name in ("w1", "w2", "w3")}),
    "GptOssForCausalLM": (LOCAL, 16, {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
    "Llama4ForCausalLM": (
        LOCAL | {"intermediate_size_mlp": 96},
        16,
        {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
    ),
}


@pytest.fixture(params=STORED)
def trained(request, tmp_path):
    """Train all blocks of some experts; return the model, and the folder of its base (in shards) and delta."""
    overrides, block_size, _ = STORED[request.param]
    tiny.build(request.param, **overrides).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    model = type(tiny.build(request.param, **overrides)).from_pretrained(tmp_path / "base")
    fields = {"target_modules": "experts", "block_size": block_size, "budget": 40, "score": "random"}
    if request.param == "OlmoeForCausalLM":
        fields["budget"] = 10
    convert_to_smt(model, tiny.choose(model, tiny.config(**fields)))
    tiny.disturb(model)
    Delta.of(model).save(tmp_path / "delta")
    return model, tmp_path


def test_merging_gives_the_trained_model(trained):
    model, folder = trained
    merge_checkpoint(folder / "base", folder / "delta", folder / "merged")
    merged = type(model).from_pretrained(folder / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(model))
    base, after = tiny.saved_tensors(folder / "base"), tiny.saved_tensors(folder / "merged")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, base[name])}
    path = "model.layers.1."
    _, _, expected = STORED[type(model).__name__]
    of_expert = {name.removeprefix(path) for name in changed if name.startswith(path)}
    assert of_expert & expected and all("experts" in name for name in changed)
    assert not verify_merge(folder / "base", folder / "delta", folder / "merged").problems


def test_a_wrong_merge_is_found(trained):
    _, folder = trained
    found = verify_merge(folder / "base", folder / "delta", folder / "base").problems
    assert found and all("experts" in name and "has the base's" in problem for name, problem in found)


def test_loading_and_saving_give_the_trained_model(trained):
    model, folder = trained
    expected = tiny.logits(model)
    assert torch.equal(tiny.logits(from_delta(folder / "delta", base=str(folder / "base"))), expected)
    rewritten = from_delta(folder / "delta", base=str(folder / "base"), merge=False)
    rewritten.save_pretrained(folder / "saved")
    assert tiny.saved_tensors(folder / "saved").keys() == tiny.saved_tensors(folder / "base").keys()
    assert torch.equal(tiny.logits(type(model).from_pretrained(folder / "saved")), expected)


def test_patches_give_the_trained_model(trained):
    model, folder = trained
    assert_patches_merge(folder, max_bytes=512)
    base = type(model).from_pretrained(folder / "base")
    apply_patches(base.state_dict(), model_patches(model, max_bytes=512))
    assert torch.equal(tiny.logits(base), tiny.logits(model))


def test_another_base_is_refused(trained):
    model, folder = trained
    other = type(model)(model.config)
    other.save_pretrained(folder / "other")
    with pytest.raises(SMTError, match=r"another base|differ"):
        merge_checkpoint(folder / "other", folder / "delta", folder / "merged")
    with pytest.raises(SMTError, match=r"another base|differ"):
        from_delta(folder / "delta", base=str(folder / "other"))


@pytest.mark.parametrize("target", ["qkv", "experts"])
def test_a_delta_on_top_of_tuned_experts_is_refused_by_the_first_base(target, trained):
    model, folder = trained
    merge_checkpoint(folder / "base", folder / "delta", folder / "stage")
    second = type(model).from_pretrained(folder / "stage")
    block_size = 16 if target == "qkv" else STORED[type(model).__name__][1]
    fields = {"target_modules": target, "block_size": block_size, "budget": 4, "score": "random"}
    convert_to_smt(second, tiny.choose(second, tiny.config(**fields)))
    tiny.disturb(second)
    Delta.of(second).save(folder / "second")
    with pytest.raises(SMTError, match=r"other values in \d+ of its .*, such as `model.layers.\d.*experts"):
        merge_checkpoint(folder / "base", folder / "second", folder / "merged")
    merge_checkpoint(folder / "stage", folder / "second", folder / "merged")
    assert torch.equal(tiny.logits(type(model).from_pretrained(folder / "merged")), tiny.logits(second))


def test_a_lora_of_experts_is_refused(trained):
    _, folder = trained
    with pytest.raises(SMTError, match="is the matrix of an expert"):
        export_lora(folder / "base", folder / "delta", folder / "adapter", max_rank=4096)


def test_a_base_without_the_experts_is_refused(trained):
    _, folder = trained
    tiny.llama().save_pretrained(folder / "other")
    with pytest.raises(SMTError, match="has no tensor `model"):
        merge_checkpoint(folder / "other", folder / "delta", folder / "merged")


def test_what_is_composed_and_taken_out_again_is_exact(trained):
    _, folder = trained
    assert_composed_and_unmerged_exactly(folder)
    compose_deltas(folder / "base", [folder / "delta", folder / "delta"], folder / "none", weights=[1, -1])
    merge_checkpoint(folder / "base", folder / "none", folder / "as before")
    tiny.assert_same(tiny.saved_tensors(folder / "as before"), tiny.saved_tensors(folder / "base"))


def test_a_delta_is_swapped_in_and_out(trained):
    model, folder = trained
    base = type(model).from_pretrained(folder / "base")
    before = tiny.weights(base)
    with applied(base, folder / "delta"):
        assert torch.equal(tiny.logits(base), tiny.logits(model))
    tiny.assert_same(tiny.weights(base), before)


@pytest.mark.parametrize("target", ["q_proj", "experts"])
def test_experts_that_loading_transposes_are_neither_compared_nor_written(target, tmp_path, warnings):
    plain = FAMILIES["Qwen3-VL-MoE"].build()
    plain.save_pretrained(tmp_path / "base")
    tensors = tiny.saved_tensors(tmp_path / "base")
    # As on the hub.
    turned = {name: one.mT.contiguous() if "mlp.experts." in name else one for name, one in tensors.items()}
    save_file(turned, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model = type(plain).from_pretrained(tmp_path / "base")
    tiny.assert_same(tiny.weights(model), tiny.weights(plain))
    names = target if target == "experts" else ["q_proj"]
    fields = {"target_modules": names, "block_size": 16, "budget": 4, "score": "random"}
    convert_to_smt(model, tiny.choose(model, tiny.config(**fields)))
    tiny.disturb(model)
    Delta.of(model).save(tmp_path / "delta")
    if target == "experts":
        with pytest.raises(SMTError, match=r"experts\.\w+` by .*Transpose.*; merge in memory instead"):
            merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    else:
        merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        assert any("4 of the" in line and "were not compared" in line for line in warnings())
        merged = type(plain).from_pretrained(tmp_path / "merged")
        tiny.assert_same(tiny.weights(merged), tiny.weights(merge_and_unload(model)))
