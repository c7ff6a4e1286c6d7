"""Norms and biases that are trained whole beside the blocks."""

import pytest
import tiny
import torch
from architectures import EXPERTS
from reference import block_mask

from smt_trainer import SMTError, convert_to_smt, load_delta, merge_checkpoint, save_delta
from smt_trainer.model.whole import find_whole
from smt_trainer.sparse.fit import match_targets

QKV = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
GPT2_NORMS = ["transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.h.1.ln_1", "transformer.h.1.ln_2"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"train_norm": True}, [*GPT2_NORMS, "transformer.ln_f"]),
        ({"train_norm": True, "lowest_layer": 1}, [*GPT2_NORMS[2:], "transformer.ln_f"]),
        ({"train_bias": True}, [f"{name}.bias" for name in QKV]),
        ({"train_norm": True, "modules_to_save": ["ln_f"], "lowest_layer": 2}, ["transformer.ln_f"]),
    ],
    ids=str,
)
def test_norms_and_biases_are_found(fields, expected):
    assert find_whole(tiny.gpt2(), tiny.config(**fields), QKV) == tuple(expected)


def test_norms_of_every_kind_are_found(llama):
    found = find_whole(llama, tiny.config(train_norm=True), [])
    assert len(found) == 5 and all(name.endswith("norm") for name in found)
    bert = tiny.build("BertForMaskedLM")
    norms = find_whole(bert, tiny.config(train_norm=True), [])
    assert len(norms) == 2 * 2 + 2 and all(name.endswith("LayerNorm") for name in norms)


def test_frozen_parts_are_left_out_unless_they_are_named():
    model = tiny.gpt2()
    for frozen in (model.transformer.h[0], model.transformer.ln_f):
        frozen.requires_grad_(False)
    fields = {"train_norm": True, "train_bias": True}
    assert find_whole(model, tiny.config(**fields), QKV) == (*GPT2_NORMS[2:], f"{QKV[1]}.bias")
    named = find_whole(model, tiny.config(modules_to_save=["ln_f", "h.0.ln_1"]), QKV)
    assert named == ("transformer.ln_f", GPT2_NORMS[0])
    model.requires_grad_(False)
    assert len(find_whole(model, tiny.config(**fields), QKV)) == 5 + 2


def test_a_frozen_head_stays_as_it_is():
    model = tiny.build("BertForSequenceClassification", num_labels=3)
    model.classifier.requires_grad_(False)
    assert find_whole(model, tiny.config(), []) == ()


def test_a_delta_trains_what_it_stores_whatever_is_frozen(tmp_path):
    trained, fields = tiny.gpt2(), {"train_norm": True, "modules_to_save": []}
    trained.transformer.h[0].requires_grad_(False)
    convert_to_smt(trained, tiny.choose(trained, tiny.config(score="random", budget=6, **fields)))
    save_delta(trained, tmp_path / "first")
    again = tiny.gpt2()
    again.transformer.ln_f.requires_grad_(False)
    load_delta(again, tmp_path / "first")
    save_delta(again, tmp_path / "second")
    assert again.smt_state.whole == trained.smt_state.whole == (*GPT2_NORMS[2:], "transformer.ln_f")
    assert tiny.saved_tensors(tmp_path / "first").keys() == tiny.saved_tensors(tmp_path / "second").keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"train_bias": True}, "none of the linears with blocks has a bias"), ({"train_norm": 2}, "train_norm must be")],
)
def test_missing_parts_are_refused_before_any_work(llama, tmp_path, fields, message):
    with pytest.raises(SMTError, match=message):
        tiny.smt_trainer(llama, tmp_path, tiny.config(**fields)).train()


def test_norms_and_biases_are_trained_stored_and_merged_and_nothing_else_changes(tmp_path):
    base = tiny.gpt2()
    base.save_pretrained(tmp_path / "base")
    before = tiny.weights(base)
    smt_config = tiny.config(train_norm=True, train_bias=True)
    trainer = tiny.smt_trainer(tiny.gpt2(), tmp_path / "run", smt_config, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "streamed")
    after = tiny.weights(type(base).from_pretrained(tmp_path / "merged"))
    selection = trainer.smt_selection
    whole = {f"{name}.{leaf}" for name in [*GPT2_NORMS, "transformer.ln_f"] for leaf in ("weight", "bias")}
    whole |= {f"{name}.bias" for name in match_targets(base, selection)}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if name in whole:
            assert not torch.equal(after[name], tensor), name
        elif module in selection.block_indices:
            mask = block_mask(selection.grids[module], selection.block_indices[module])
            assert torch.equal(after[name][~mask], tensor[~mask]) and not torch.equal(after[name][mask], tensor[mask])
        else:
            assert torch.equal(after[name], tensor), name
    for model in (
        load_delta(base, tmp_path / "delta", merge=True),
        type(base).from_pretrained(tmp_path / "streamed"),
    ):
        assert all(torch.equal(tensor, after[name]) for name, tensor in tiny.weights(model).items())
    resumed = tiny.smt_trainer(tiny.gpt2(), tmp_path / "run", smt_config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ours, theirs = (dict(each.model.named_parameters()) for each in (resumed, trainer))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_module_without_parameters_is_refused(llama):
    with pytest.raises(SMTError, match=r"modules_to_save names 'act_fn', which has no parameters"):
        convert_to_smt(llama, tiny.choose(llama, tiny.config(score="random", modules_to_save=["act_fn"])))


def test_biases_are_trained_beside_blocks_of_experts():
    model = tiny.build("Qwen2MoeForCausalLM", num_key_value_heads=2, **EXPERTS)
    smt_config = tiny.config(score="random", target_modules="all-linear", train_bias=True, scope="per_module", budget=1)
    convert_to_smt(model, tiny.choose(model, smt_config))
    assert set(model.smt_state.whole) == {
        f"model.layers.{layer}.self_attn.{name}.bias" for layer in (0, 1) for name in ("q_proj", "k_proj", "v_proj")
    }
