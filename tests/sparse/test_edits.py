"""What others write into a weight that holds blocks is kept, and no change of the blocks is taken for it."""

import pickle

import pytest
import tiny
import torch
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, from_delta, merge_and_unload, save_delta
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.last_equal import warn_of_edits

NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture(autouse=True)
def warn_again():
    """Let each test see the warning, which is given once in a process."""
    warn_of_edits.cache_clear()


@pytest.fixture
def model():
    """A model that trains some blocks, after two steps."""
    model = convert_to_smt(
        tiny.llama(), tiny.choose(tiny.llama(), tiny.config(target_modules="all-linear", score="random"))
    )
    for _ in range(2):
        tiny.step(model, **tiny.batch())
    return model


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_merged_over_blocks_stays_merged(merge, safe, model, tmp_path, warnings):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).train()
    adapted(**tiny.batch()).loss.backward()
    expected = tiny.logits(adapted)
    merged = getattr(adapted, merge)(safe_merge=safe) or adapted
    torch.testing.assert_close(tiny.logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)
    assert any("changed from outside" in line for line in warnings())
    if merge == "merge_and_unload":
        merged.save_pretrained(tmp_path)
        tiny.assert_same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(merged))


def test_an_adapter_can_be_taken_out_again(model):
    peft = pytest.importorskip("peft")
    expected = tiny.logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tiny.logits(adapted)
    for _ in range(2):
        adapted.merge_adapter()
        adapted.eval()
        adapted.unmerge_adapter()
        adapted.eval()
    torch.testing.assert_close(tiny.logits(adapted.unload()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_clamped_after_each_step_trains_as_a_dense_one(dtype):
    def clamp(model):
        with torch.no_grad():
            for name in NAMES:
                model.get_submodule(name).weight.clamp_(-0.02, 0.02)

    dense = tiny.llama().to(dtype).requires_grad_(False)
    selection = tiny.every_block(dense, NAMES, master_dtype=str(dtype).removeprefix("torch."))
    model = convert_to_smt(tiny.llama().to(dtype), selection)
    for name in NAMES:
        dense.get_submodule(name).weight.requires_grad_(True)
    for each in (dense, model):
        optimizer = torch.optim.SGD([one for one in each.parameters() if one.requires_grad], lr=0.1)
        for _ in range(3):
            each(**tiny.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clamp(each)
    merged = merge_and_unload(model.eval())
    for name in NAMES:
        weight = merged.get_submodule(name).weight
        torch.testing.assert_close(weight, dense.get_submodule(name).weight)
        assert weight.abs().max() <= 0.02


def test_values_that_nobody_edited_keep_the_precision_of_the_masters():
    model = tiny.llama().bfloat16()
    model = convert_to_smt(model, tiny.every_block(model, NAMES))
    with torch.no_grad():
        for _, module in block_modules(model):
            module.blocks += 1e-5
    tiny.logits(model)
    before = {name: module.blocks.detach().clone() for name, module in block_modules(model)}
    with torch.no_grad():
        model.get_submodule(NAMES[0]).weight[3, 5] = 7
    tiny.logits(model)
    changed = {name: (module.blocks != before[name]).sum().item() for name, module in block_modules(model)}
    assert changed == {NAMES[0]: 1, NAMES[1]: 0}


def test_averages_of_the_blocks_go_in_and_out_through_data(model, warnings):
    own = {name: module.blocks.detach().clone() for name, module in block_modules(model)}
    expected = tiny.logits(model.eval())
    for _ in range(2):
        for name, module in block_modules(model):
            module.blocks.data.copy_(own[name] + 0.5)
        averaged = tiny.logits(model.train().eval())
        assert not torch.equal(averaged, expected)
        for name, module in block_modules(model):
            module.blocks.data.copy_(own[name])
        tiny.assert_same(tiny.logits(model.train().eval()), expected)
    assert not any("changed from outside" in line for line in warnings())


def test_a_pickled_model_has_no_second_copy_of_its_weights(monkeypatch):
    monkeypatch.setattr("smt_trainer.sparse.write_back.LARGE_BLOCK", 1)
    model = convert_to_smt(tiny.llama(), tiny.every_block(tiny.llama(), NAMES))
    before = len(pickle.dumps(model))
    tiny.step(model, **tiny.batch())
    assert len(pickle.dumps(model)) < 1.01 * before
    tiny.assert_same(tiny.logits(pickle.loads(pickle.dumps(model))), tiny.logits(model))


@pytest.mark.parametrize("merge", [True, False])
def test_a_delta_is_loaded_in_inference_mode(merge, model, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    save_delta(model, tmp_path / "delta")
    expected = tiny.logits(model)
    with torch.inference_mode():
        loaded = from_delta(tmp_path / "delta", base=str(tmp_path / "base"), merge=merge)
        tiny.assert_same(tiny.logits(loaded), expected)
        if not merge:
            for _, module in block_modules(loaded):
                module.blocks += 1
            assert not torch.equal(tiny.logits(loaded), expected)


def test_a_linear_that_is_pruned_after_its_blocks_were_taken_is_refused(model):
    prune.l1_unstructured(model.get_submodule(NAMES[0]), "weight", amount=0.3)
    with pytest.raises(SMTError, match="no parameter any more: pruning or a parametrization"):
        model(**tiny.batch())
