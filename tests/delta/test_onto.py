"""The three ways back of a delta that was trained over a quantised base."""

import json
import logging

import pytest
import quantised
import tiny
import torch
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, from_delta, load_delta, merge_and_unload, merge_checkpoint, save_delta
from smt_trainer.cli import main
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.model_card import delta_card
from smt_trainer.model.quantised import keep_differentiable, quantization_of
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.sparse.state import get_state, is_smt_model

pytest.importorskip("bitsandbytes")
KINDS = list(quantised.KINDS)
# bitsandbytes multiplies integers in the other linears, where the dense model does not.
NEAR = {"int8": 0.05}


def trained(base, kind, folder, **more):
    """Return a quantised model with changed blocks, and save its delta."""
    model = quantised.load(base, kind, **more)
    convert_to_smt(model, tiny.choose(model))
    tiny.disturb(model)
    save_delta(model, folder)
    return model


@pytest.fixture(params=KINDS)
def case(request, base, tmp_path):
    """Return the kind, the base, the delta and the logits of the trained model."""
    model = trained(base.resolve(), request.param, tmp_path / "delta")
    return request.param, base, tmp_path / "delta", tiny.logits(model)


def test_base_and_blocks_apart_are_exactly_the_trained_model(case):
    kind, base, delta, expected = case
    tiny.assert_same(tiny.logits(from_delta(delta, base=base, quantization_config=quantised.config(kind))), expected)
    model = quantised.load(base, kind)
    assert load_delta(model, delta) is model
    tiny.assert_same(tiny.logits(model), expected)


def test_dequantized_is_the_trained_model_with_dense_weights(case):
    kind, base, delta, expected = case
    model = from_delta(delta, base=base, onto="dequantized")
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=NEAR.get(kind, 0))


def test_all_ways_to_dequantized_write_the_same_weights(case, tmp_path):
    kind, base, delta, _ = case
    found = {"from_delta": from_delta(delta, base=base, onto="dequantized").state_dict()}
    model = load_delta(quantised.load(base, kind), delta)
    found["in memory"] = merge_and_unload(model, onto="dequantized").state_dict()
    found["load_delta"] = load_delta(quantised.load(base, kind), delta, merge=True, onto="dequantized").state_dict()
    model.save_pretrained(tmp_path / "saved")
    merge_checkpoint(base, delta, tmp_path / "merged", onto="dequantized")
    for name in ("saved", "merged"):
        found[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
    for state in found.values():
        tiny.assert_same(dict(state), dict(found["from_delta"]))
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert tiny.saved_tensors(tmp_path / "saved").keys() == tiny.saved_tensors(tmp_path / "merged").keys()


def test_original_puts_the_blocks_into_the_weights_that_were_quantised(case, tmp_path):
    _, base, delta, _ = case
    merge_checkpoint(base, delta, tmp_path / "merged", onto="original")
    found, before, content = tiny.saved_tensors(tmp_path / "merged"), tiny.saved_tensors(base), Delta.load(delta)
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        expected = before[name].clone()
        if module in content.blocks:
            indices = torch.from_numpy(content.selection.block_indices[module])
            content.selection.grids[module].scatter_(expected, indices, content.blocks[module])
        tiny.assert_same(tensor, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tiny.assert_same(tiny.logits(plain), tiny.logits(from_delta(delta, base=base, onto="original", dtype=plain.dtype)))


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_merge_says_how_far_it_is_from_the_trained_model(onto, case, tmp_path, caplog):
    kind, base, delta, _ = case
    with caplog.at_level(logging.INFO, "smt_trainer"):
        merge_checkpoint(base, delta, tmp_path / "merged", onto=onto)
    line = caplog.messages[-1]
    assert "compared with the trained one over 96 tokens of a few prompts: KL" in line
    if onto == "dequantized" and kind != "int8":
        # The base is in float32, and so is the merged model's `dtype`; its weights are those of bfloat16.
        assert "the same most likely token after 100% of them" in line


def test_what_is_left_open_is_refused(case, tmp_path):
    kind, base, delta, _ = case
    match = r"quantised.*onto='dequantized'.*onto='original'.*quantization_config"
    with pytest.raises(SMTError, match=match):
        from_delta(delta, base=base)
    with pytest.raises(SMTError, match=match):
        merge_checkpoint(base, delta, tmp_path / "merged")
    with pytest.raises(SMTError, match=match):
        load_delta(tiny.llama(), delta)
    with pytest.raises(SMTError, match=match):
        load_delta(quantised.load(base, kind), delta, merge=True)
    assert not (tmp_path / "merged").exists()
    model = load_delta(quantised.load(base, kind), delta)
    for merge in (merge_and_unload, lambda model: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(SMTError, match=r"quantised weights of this model cannot hold.*save_delta.*'dequantized'"):
            merge(model)


def test_a_plain_model_is_not_taken_for_dequantized_weights(case):
    _, base, delta, _ = case
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain.state_dict()
    for merge in (False, True):
        with pytest.raises(SMTError, match="needs the base quantised as in training, and this model is plain"):
            load_delta(plain, delta, merge=merge, onto="dequantized")
    assert not is_smt_model(plain)
    tiny.assert_same(plain.state_dict(), before)


def test_dequantized_also_makes_a_model_dense_whose_blocks_lie_in_plain_weights(base, tmp_path):
    skipping = {"llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "lm_head"]}
    delta = tmp_path / "delta"
    expected = tiny.logits(trained(base, "nf4", delta, **skipping))
    given = quantised.config("nf4", **skipping)
    assert quantization_of(from_delta(delta, base=base, quantization_config=given)) is not None
    found = {"from_delta": from_delta(delta, base=base, onto="dequantized")}
    model = quantised.load(base, "nf4", **skipping)
    found["load_delta"] = load_delta(model, delta, merge=True, onto="dequantized")
    merge_checkpoint(base, delta, tmp_path / "merged", onto="dequantized")
    found["merge_checkpoint"] = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for dense in found.values():
        assert quantization_of(dense) is None
        tiny.assert_same(tiny.logits(dense), expected)
        tiny.assert_same(dict(dense.state_dict()), dict(found["from_delta"].state_dict()))


@pytest.mark.parametrize("onto", ["orignal", "dequantized", "original"])
def test_a_plain_delta_takes_no_word_on_what_it_is_merged_onto(onto, base, delta, tmp_path):
    folder, model = delta
    with pytest.raises(SMTError, match="onto"):
        merge_checkpoint(base, folder, tmp_path / "merged", onto=onto)
    with pytest.raises(SMTError, match="onto"):
        from_delta(folder, base=base, onto=onto)
    with pytest.raises(SMTError, match="onto"):
        merge_and_unload(model, onto=onto)


def test_a_plain_delta_is_not_put_into_a_quantised_base(base, delta):
    with pytest.raises(SMTError, match="was trained on a base that was not quantised, and this one is"):
        load_delta(quantised.load(base, "nf4"), delta[0])


@pytest.mark.parametrize("other", [("fp4", {}), ("int8", {}), ("nf4", {"bnb_4bit_use_double_quant": False})], ids=str)
def test_a_base_that_was_quantised_in_another_way_is_refused(other, base, tmp_path):
    trained(base, "nf4", tmp_path / "delta")
    kind, more = other
    with pytest.raises(SMTError, match="base was quantised in another way"):
        load_delta(quantised.load(base, kind, **more), tmp_path / "delta")


def test_another_base_that_is_quantised_alike_is_refused(base, tmp_path):
    trained(base, "nf4", tmp_path / "delta")
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= torch.rand_like(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SMTError, match=r"has other values in 1 of its .* `model.layers.0.mlp.up_proj.weight`"):
        load_delta(quantised.load(tmp_path / "other", "nf4"), tmp_path / "delta")
    with pytest.raises(SMTError, match="has other values in 1 of its"):
        merge_checkpoint(tmp_path / "other", tmp_path / "delta", tmp_path / "merged", onto="original")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_stored_quantised_serves_as_one_that_is_quantised_on_loading(kind, base, tmp_path):
    expected = tiny.logits(trained(base, kind, tmp_path / "delta"))
    quantised.load(base, kind).save_pretrained(tmp_path / "stored")
    tiny.assert_same(tiny.logits(from_delta(tmp_path / "delta", base=tmp_path / "stored")), expected)
    merge_checkpoint(tmp_path / "stored", tmp_path / "delta", tmp_path / "merged", onto="dequantized")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(tiny.logits(merged), expected, rtol=0, atol=NEAR.get(kind, 0))
    from_delta(tmp_path / "delta", base=tmp_path / "stored", onto="dequantized").save_pretrained(tmp_path / "saved")
    tiny.assert_same(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()), merged.state_dict())
    with pytest.raises(SMTError, match="needs the checkpoint that was quantised"):
        merge_checkpoint(tmp_path / "stored", tmp_path / "delta", tmp_path / "no", onto="original")
    with pytest.raises(SMTError, match="cannot hold the trained blocks"):
        merge_checkpoint(tmp_path / "stored", tmp_path / "delta", tmp_path / "no")


# ---- attention in 16 bits, the rest quantised ----

PLAIN_ATTENTION = {"llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]}


def load_plain(folder):
    """Load a quantised checkpoint, and keep bitsandbytes from rounding its scales when it evaluates on a CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    keep_differentiable(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_plain_weights_of_a_quantised_base_merge_exactly(kind, base, tmp_path):
    model = trained(base, kind, tmp_path / "delta", **PLAIN_ATTENTION)
    expected = tiny.logits(model)
    assert type(model.model.layers[0].self_attn.v_proj).__name__ == "SMTLinear"
    quantised.load(base, kind, **PLAIN_ATTENTION).save_pretrained(tmp_path / "stored")
    merge_checkpoint(tmp_path / "stored", tmp_path / "delta", tmp_path / "merged")
    tiny.assert_same(tiny.logits(load_plain(tmp_path / "merged")), expected)
    config = quantised.config(kind, **PLAIN_ATTENTION)
    again = from_delta(tmp_path / "delta", base=base, quantization_config=config)
    keep_differentiable(again)
    assert type(again.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    tiny.assert_same(tiny.logits(again), expected)
    merge_and_unload(model).save_pretrained(tmp_path / "saved")
    tiny.assert_same(tiny.logits(load_plain(tmp_path / "saved")), expected)


def test_the_other_weights_of_a_mixed_base_leave_it_open_what_is_merged(base, tmp_path):
    trained(base, "nf4", tmp_path / "delta", **PLAIN_ATTENTION)
    with pytest.raises(SMTError, match="onto='dequantized'"):
        merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged", onto="original")


def test_a_delta_records_how_its_base_was_quantised(base, tmp_path):
    trained(base, "nf4", tmp_path / "delta")
    recorded = json.loads((tmp_path / "delta" / "smt_config.json").read_text())
    assert recorded["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert Delta.load(tmp_path / "delta").quantization == quantised.config("nf4").to_dict()
    assert Delta.load(tmp_path / "delta").weight_dtype == "bfloat16"


def test_inspect_says_how_the_base_was_quantised(base, tmp_path, capsys):
    trained(base, "nf4", tmp_path / "delta")
    assert main(["inspect", str(tmp_path / "delta")]) == 0
    assert "quantised    bitsandbytes, 4 bits, nf4, double\n" in capsys.readouterr().out


def test_a_model_card_says_how_to_load_a_delta_of_a_quantised_base(base, tmp_path):
    state = get_state(trained(base, "fp4", tmp_path / "delta"))
    given = "# card", state.selection, "LlamaForCausalLM", tmp_path, "me/mine"
    card = delta_card(*given, state.quantization)
    assert "| trained over a quantised base | bitsandbytes, 4 bits, fp4; `quantization_config=` instead" in card
    assert 'base="path/to/base", onto="dequantized")' in card
    assert "quantised" not in delta_card(*given)


def test_a_quantised_module_is_not_trained_whole(base):
    model = quantised.load(base, "nf4")
    with pytest.raises(SMTError, match=r"trains `model.layers.1.mlp` whole, but .*gate_proj` is quantised"):
        find_candidates(model, tiny.config(modules_to_save=["layers.1.mlp"]))
    find_candidates(model, tiny.config(modules_to_save=["norm"], train_norm=True))
