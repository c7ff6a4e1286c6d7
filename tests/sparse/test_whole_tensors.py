"""What the user lets be trained beside the blocks is in the delta, too."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from weight_patches import apply_patches

from smt_trainer import (
    SMTError,
    SMTTrainer,
    applied,
    convert_to_smt,
    from_delta,
    load_delta,
    merge_checkpoint,
    model_patches,
    save_delta,
    swap,
    verify_merge,
)
from smt_trainer.sparse.whole_tensors import WholeTensors

UNFROZEN = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def unfrozen(base, **fields):
    """Load a model that trains blocks, and let other parameters be trained as well."""
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields)))
    for name in UNFROZEN:
        model.get_parameter(name).requires_grad_(True)
    return model


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"train_norm": True}], ids=str)
def test_every_way_back_gives_the_trained_model(fields, base, tmp_path, caplog):
    model = unfrozen(base, **fields)
    tiny.disturb(model)
    assert {*UNFROZEN} <= WholeTensors.of(model).tensors.keys()
    save_delta(model, tmp_path / "delta")
    assert "require a gradient" in caplog.text
    expected, folder = tiny.logits(model), str(base)
    assert torch.equal(tiny.logits(from_delta(tmp_path / "delta", base=folder)), expected)
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert not verify_merge(base, tmp_path / "delta", tmp_path / "merged").problems
    plain = AutoModelForCausalLM.from_pretrained(base)
    with applied(plain, tmp_path / "delta"):
        assert torch.equal(tiny.logits(plain), expected)
    apply_patches(plain.state_dict(), model_patches(model))
    assert torch.equal(tiny.logits(plain), expected)


def test_a_loaded_model_trains_and_holds_the_same(base, tmp_path):
    model = unfrozen(base)
    tiny.disturb(model)
    save_delta(model, tmp_path / "delta")
    again = load_delta(AutoModelForCausalLM.from_pretrained(base), tmp_path / "delta")
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert WholeTensors.of(again).tensors.keys() == WholeTensors.of(model).tensors.keys()
    tiny.assert_same(tiny.logits(again), tiny.logits(model))
    load_delta(model, tmp_path / "delta")


def test_a_trainer_saves_it_and_resumes(base, tmp_path):
    def trained(folder, steps, resume=None):
        args = tiny.arguments(
            folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        trainer = SMTTrainer(model=unfrozen(base), args=args, train_dataset=tiny.examples())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "halves", 2)
    again = trained(tmp_path / "halves", 4, resume=True)
    tiny.assert_same(again.model.state_dict(), whole.model.state_dict())
    whole.save_model(tmp_path / "delta")
    loaded = from_delta(tmp_path / "delta", base=str(base))
    assert torch.equal(tiny.logits(loaded), tiny.logits(whole.model))


def test_what_lies_under_blocks_or_is_named_is_not_unfrozen(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    selection = tiny.choose(model, tiny.config(score="random", modules_to_save=["lm_head"]))
    convert_to_smt(model, selection)
    assert WholeTensors.of(model).unnamed == set()
    model.get_submodule(next(iter(selection.block_indices))).weight.requires_grad_(True)
    assert WholeTensors.of(model).unnamed == set()
    assert WholeTensors.of(model).tensors.keys() == {"lm_head.weight"}


def test_a_delta_without_it_is_not_swapped_into_a_model_that_has_it(base, tmp_path):
    model = unfrozen(base)
    save_delta(model, tmp_path / "with")
    for name in UNFROZEN:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(SMTError, match=r"only one of the delta and this model.*holds `lm_head\.weight`"):
        swap(model, tmp_path / "with")


def load_others(model):
    model.load_state_dict(tiny.llama(seed=3).state_dict(), strict=False)


def cast(model):
    model.bfloat16()


def write(model):
    model.model.embed_tokens.weight[5] += 1


@pytest.mark.parametrize("change", [load_others, cast, write])
def test_a_base_that_has_changed_under_the_blocks_is_named(change, llama, tmp_path, caplog):
    convert_to_smt(llama, tiny.choose(llama, tiny.config(score="random", modules_to_save=["lm_head"])))
    tiny.disturb(llama)
    save_delta(llama, tmp_path / "delta")
    assert not caplog.text
    change(llama)
    save_delta(llama, tmp_path / "delta")
    assert "have other values than when the blocks were taken" in caplog.text
    assert "`model.embed_tokens.weight`" in caplog.text


def test_a_finer_dtype_and_swapped_blocks_change_no_base(base, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random")))
    save_delta(model, tmp_path / "first")
    tiny.disturb(model)
    with applied(model, tmp_path / "first"):
        save_delta(model, tmp_path / "second")
    save_delta(model.double(), tmp_path / "third")
    assert not caplog.text


def test_what_a_delta_does_not_hold_is_named_when_it_is_loaded_into_a_model_that_trains_it(base, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    load_delta(model, tmp_path / "delta")
    assert not caplog.text
    model.model.norm.weight.requires_grad_(True)
    load_delta(model, tmp_path / "delta")
    assert "does not hold 1 tensors that this model trains, such as `model.norm.weight`" in caplog.text


def test_statistics_that_a_delta_does_not_hold_are_those_of_the_base_again(tmp_path, caplog):
    model = tiny.llama()
    model.register_buffer("seen", torch.zeros(()))
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    model.seen += 1
    load_delta(model, tmp_path / "delta")
    assert model.seen == 0 and not caplog.text


def test_a_weight_with_blocks_that_was_unfrozen_is_named(base, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(base)
    selection = tiny.choose(model)
    convert_to_smt(model, selection)
    name = next(iter(selection.block_indices))
    model.get_submodule(name).weight.requires_grad_(True)
    trainer = SMTTrainer(model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.examples())
    trainer.train()
    trainer.save_model()
    assert f"1 weights with blocks, such as that of `{name}`, require a gradient" in caplog.text
