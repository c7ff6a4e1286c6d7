import logging

import pytest
import quantised
import tiny
import torch
from torch import nn

from smt_trainer import BlockScores, SMTConfig, SMTError, convert_to_smt
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.quantised import bits_of, dense_weight, dequantised, keep_differentiable
from smt_trainer.model.targets import count_parameters, find_targets

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind, bits", [("nf4", 4), ("fp4", 4), ("int8", 8)])
def test_what_bitsandbytes_has_quantised_is_known_by_its_weight(kind, bits):
    assert bits_of(quantised.make_linear(kind)) == bits


def test_other_modules_are_not_quantised():
    not_yet = bnb.nn.Linear4bit(64, 64)
    half = bnb.nn.Linear8bitLt(64, 64)
    assert [bits_of(module) for module in (nn.Linear(4, 4), nn.ReLU(), not_yet, half)] == [None] * 4


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_are_dequantised_as_bitsandbytes_does(kind, storage):
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    linear = bnb.nn.Linear4bit(128, 64, bias=False, quant_type=kind, quant_storage=storage)
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, quant_storage=storage, module=linear
    )
    linear = linear.to("cpu")
    assert linear.weight.dtype == storage
    expected = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    tiny.assert_same(dequantised(linear, torch.bfloat16), expected)
    assert (dense_weight(linear) - weight.float()).abs().max() < 0.7


def test_eight_bits_are_dequantised_before_and_after_the_first_forward():
    linear = quantised.make_linear("int8")
    before = dense_weight(linear)
    linear(torch.randn(2, 128).bfloat16())
    tiny.assert_same(dense_weight(linear), before)


@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_a_quantised_model_has_the_targets_and_the_number_of_parameters_of_the_plain_one(kind, llama, base):
    model = quantised.load(base, kind)
    assert list(find_targets(model, SMTConfig())) == list(find_targets(llama, SMTConfig()))
    assert count_parameters(model) == count_parameters(llama)


def test_quantised_weights_are_targets_although_they_require_no_gradient(base, warnings):
    model = quantised.load(base, "nf4")
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert len(find_targets(model, SMTConfig())) == 6
    assert not warnings()


def test_a_conv1d_that_was_quantised_is_no_target(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path)
    with pytest.raises(SMTError, match="none of which can be tuned"):
        find_targets(quantised.load(tmp_path, "nf4"), SMTConfig())


class PackedLinear(nn.Module):
    """A linear as GPTQ and AWQ store it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))


def test_linears_of_other_formats_are_left_out_in_one_line_that_says_what_to_do(llama, warnings):
    for layer in llama.model.layers:
        layer.self_attn.v_proj = PackedLinear(layer.self_attn.v_proj)
    for target_modules in ("qkv", ["q_proj", "k_proj", "v_proj"]):
        assert len(find_targets(llama, SMTConfig(target_modules=target_modules))) == 4
    line, again = warnings()
    assert line == again
    assert line.startswith("2 linears, such as `model.layers.0.self_attn.v_proj`, are not tuned: a PackedLinear has no")
    assert "BitsAndBytesConfig" in line


def test_a_model_of_another_format_throughout_is_refused(llama):
    for layer in llama.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, PackedLinear(getattr(layer.self_attn, name)))
    with pytest.raises(SMTError, match=r"matches 6 linears, none of which can be tuned.*quantised by bitsandbytes"):
        find_targets(llama, SMTConfig())


def test_a_weight_of_float8_is_left_out_with_what_to_do(llama, warnings):
    projection = llama.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    find_targets(llama, SMTConfig())
    assert "a Parameter of torch.float8_e4m3fn; load it unquantised, or quantised by" in warnings()[0]


# ---- the CPU's packed format ----


def test_no_evaluation_repacks_a_model_that_trains(base):
    model = quantised.load(base, "nf4")
    convert_to_smt(model, tiny.choose(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny.logits(model)
    tiny.assert_same(dict(model.state_dict()), before)
    model.train()
    output = model(**tiny.batch())
    output.loss.backward()
    blocks = [each for name, each in model.named_parameters() if name.endswith("blocks")]
    assert all(each.grad.abs().sum() > 0 for each in blocks)


@pytest.mark.parametrize("score", ["grad_l1", "activation"])
def test_scores_of_a_model_in_evaluation_repack_nothing(score, base):
    model = quantised.load(base, "nf4").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = BlockScores.of(model, tiny.config(score=score), [tiny.batch()])
    tiny.assert_same(dict(model.state_dict()), before)
    trained = BlockScores.of(quantised.load(base, "nf4").train(), tiny.config(score=score), [tiny.batch()])
    tiny.assert_same(scores.scores, trained.scores)
    convert_to_smt(model, scores.select())


def test_a_repacked_model_is_refused(base):
    model = quantised.load(base, "nf4")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SMTError, match=r"repacked `model.layers.1.mlp.up_proj`.*Load the model again"):
        convert_to_smt(model, tiny.choose(model))
    with pytest.raises(SMTError, match="repacked"):
        keep_differentiable(model)
    with pytest.raises(SMTError, match="repacked"):
        BlockScores.of(model, tiny.config(score="magnitude"), [])


# ---- fingerprint ----


@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_the_fingerprint_tells_plain_tensors_from_quantised_ones(kind, llama, base):
    found = Fingerprint.of(quantised.load(base, kind), torch.bfloat16)
    assert len(found.codes) == 14
    assert found.codes.keys() == {name for name, _ in llama.named_parameters() if "_proj" in name}
    again = Fingerprint.of(quantised.load(base, kind), torch.bfloat16)
    assert again == found


def test_another_base_has_other_codes(base, tmp_path):
    other = tiny.llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight[3, 5] += 1
    other.save_pretrained(tmp_path / "other")
    ours, theirs = (Fingerprint.of(quantised.load(each, "nf4"), torch.bfloat16) for each in (base, tmp_path / "other"))
    assert ours.checksums == theirs.checksums
    assert [name for name in ours.codes if ours.codes[name] != theirs.codes[name]] == [
        "model.layers.0.self_attn.v_proj.weight"
    ]


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
