"""The estimate on a base in few bits against bitsandbytes on the CPU."""

import itertools

import pytest
import tiny
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from smt_trainer import SMTError, convert_to_smt
from smt_trainer.cli import main
from smt_trainer.estimation.estimate import estimate
from smt_trainer.estimation.quantised import BITS, QuantisedBase, quantised_bytes

bnb = pytest.importorskip("bitsandbytes")

BATCH, LENGTH = 4, tiny.LENGTH
METHODS = ("smt", "lora", "full")
QKV = ["q_proj", "k_proj", "v_proj"]
# Numbers in arithmetic become tensors on a CPU, which allocates 16 bytes for each.
NUMBERS = 5 * 16


def guess(model, smt_config=None, **kwargs):
    """Estimate a run of a tiny model."""
    defaults = {"batch": BATCH, "seq": LENGTH, "dtype": torch.float32}
    return estimate(model.config, smt_config or tiny.config(), **defaults | kwargs)


def quantise(model, bits, folder, dtype=torch.float32):
    """Return the model as transformers loads it in 4 or 8 bits."""
    model.to(dtype).save_pretrained(folder)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).train()


def checkpoint(model):
    """Let a model checkpoint its activations as SMTTrainer does."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    model.disable_input_require_grads()


def held(linear):
    """Return the bytes of all tensors that a linear of bitsandbytes holds of its weight."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return linear.weight.nbytes + linear.weight.SCB.nbytes
    state = linear.weight.quant_state
    scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return linear.weight.nbytes + sum(tensor.nbytes for tensor in scales)


def live(model):
    """Run a step; return the bytes alive when the output embeddings are reached, and at its peak."""

    def mark(*_):
        with record_function("head"):
            pass

    handle = model.get_output_embeddings().register_forward_pre_hook(mark)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tokens = tiny.batch(BATCH)["input_ids"].clone()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    handle.remove()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    head = next(event.start_ns() for event in events if event.name() == "head")
    memory = [event for event in events if event.name() == "[memory]"]
    return (
        sum(event.nbytes() for event in memory if event.start_ns() < head),
        max(itertools.accumulate(event.nbytes() for event in memory)),
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (64, 64), (96, 200), (1024, 257)])
def test_a_weight_takes_the_bytes_of_the_real_tensors(rows, columns):
    plain = nn.Linear(columns, rows)
    in_4_bits = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", compress_statistics=True)
    in_8_bits = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False)
    for bits, linear in {4: in_4_bits, 8: in_8_bits}.items():
        linear.load_state_dict(plain.state_dict())
        assert held(linear.to("cpu")) == quantised_bytes(plain, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=lambda build: build.__name__)
def test_the_linears_are_those_that_transformers_quantises(build, bits, tmp_path):
    found = guess(build(), dtype=torch.bfloat16, bits=bits)
    base = QuantisedBase.of(build(), bits)
    model = quantise(build(), bits, tmp_path, torch.bfloat16)
    linears = {
        name: held(module)
        for name, module in model.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }
    assert linears == base.sizes
    quantised = {f"{name}.weight" for name in linears}
    rest = [p for name, p in [*model.named_parameters(), *model.named_buffers()] if name not in quantised]
    weights = base.nbytes + sum(tensor.nbytes for tensor in rest)
    assert found.smt.weights == found.lora.weights == found.warmup.weights == weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_alive_is_what_peft_and_bitsandbytes_need(bits, checkpointing, tmp_path):
    peft = pytest.importorskip("peft")
    # Layers that need more than the loss, so that a dense weight shows in the peak.
    found = guess(tiny.llama(intermediate_size=512), bits=bits, checkpointing=checkpointing)
    model = quantise(tiny.llama(intermediate_size=512), bits, tmp_path)
    if checkpointing:
        checkpoint(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=found.lora_rank, target_modules=QKV))
    activations, peak = live(model)
    cost = found.lora
    assert 0 <= activations - cost.activations <= NUMBERS
    # The kernel for 4 bits has the scales in float32 beside the dense weight.
    scales = 512 * 64 // 64 * 4 + 64 if bits == 4 else 0
    assert 0 <= peak - (cost.peak - cost.weights - cost.added - cost.optimizer) <= scales + NUMBERS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_alive_is_what_a_step_over_a_quantised_base_needs(bits, checkpointing, tmp_path):
    # The estimate knows no scores: as many blocks in each module, wherever they lie.
    smt_config = tiny.config(score="random", budget=1, scope="per_module")
    found = guess(tiny.llama(intermediate_size=512), smt_config, bits=bits, checkpointing=checkpointing)
    model = quantise(tiny.llama(intermediate_size=512), bits, tmp_path)
    if checkpointing:
        checkpoint(model)
    convert_to_smt(model, tiny.choose(model, smt_config))
    activations, peak = live(model.train())
    cost = found.smt
    assert activations == cost.activations
    assert peak == cost.peak - cost.weights - cost.added - cost.optimizer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_needs_one_dense_weight_more(checkpointing):
    # So few tokens that no activation is as large as the largest weight.
    model, dense = tiny.llama(intermediate_size=2048), 2048 * 64 * 4
    plain, quantised = (guess(model, bits=bits, checkpointing=checkpointing, batch=1) for bits in (None, 4))
    for method in ("smt", "lora", "warmup"):
        one, other = getattr(plain, method), getattr(quantised, method)
        assert (one.added, one.optimizer, one.gradients) == (other.added, other.optimizer, other.gradients)
        assert (one.activations, one.flops, one.trainable) == (other.activations, other.flops, other.trainable)
        assert dense / 2 < (other.peak - other.weights) - (one.peak - one.weights) <= dense


def test_fewer_bits_take_less_and_full_fine_tuning_is_left_alone(llama):
    four, eight, sixteen = (guess(llama, dtype=torch.bfloat16, bits=bits, checkpointing=True) for bits in (4, 8, None))
    for method in ("smt", "lora", "warmup"):
        weights, peaks = zip(
            *((cost.weights, cost.peak) for cost in (getattr(each, method) for each in (four, eight, sixteen))),
            strict=True,
        )
        assert weights[0] < weights[1] < weights[2]
        assert peaks[0] < peaks[1] and peaks[0] < peaks[2]
    assert four.full == eight.full == sixteen.full
    assert four.write_back == eight.write_back == 0 < sixteen.write_back
    assert four.delta == eight.delta == sixteen.delta


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_linear_with_blocks_keeps_no_more_in_8_bits_than_in_4(llama, checkpointing):
    everywhere = tiny.config(target_modules="all-linear", budget=1, scope="per_module")
    four, eight = (guess(llama, everywhere, bits=bits, checkpointing=checkpointing).smt.activations for bits in BITS)
    assert four == eight


def test_checkpointing_does_not_drop_the_inputs_of_frozen_linears_in_8_bits(llama):
    few = tiny.config(target_modules=["0.self_attn.q_proj"], budget=1)
    four, eight = (guess(llama, few, bits=bits, checkpointing=True).smt.activations for bits in BITS)
    # In the layer with the block, those of o, of gate and up, and of down; above it also that of q, k and v.
    assert eight - four == BATCH * LENGTH * (2 * (64 + 64 + 96) + 64) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, r"bits must be 4 \(NF4\), 8 \(LLM.int8\) or None, got 3"),
        ({"bits": 4, "zero_stage": 3}, "expected zero_stage 0, 1 or 2 with bits, got 3"),
        (
            {"bits": 8, "smt_config": tiny.config(modules_to_save=["layers.1.mlp"])},
            r"trains `model.layers.1.mlp` whole, but the weight of `model.layers.1.mlp.gate_proj` is held in 8 bits",
        ),
    ],
)
def test_what_few_bits_rule_out_is_refused(llama, arguments, message):
    with pytest.raises(SMTError, match=message):
        guess(llama, **arguments)


def test_embeddings_can_be_trained_whole_beside_a_quantised_base(llama):
    found = guess(llama, tiny.config(modules_to_save=["lm_head"]), bits=4)
    assert found.smt.trainable == found.selection.trainable_parameters + 64 * tiny.VOCABULARY


def test_the_command_takes_bits(base, capsys):
    peaks = {}
    for bits in ([], ["--bits", "8"], ["--bits", "4"]):
        assert main(["estimate", str(base), "--budget", "0.05", "--score", "random", "--seq", "4", *bits]) == 0
        weights = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights"))
        peaks[tuple(bits)] = [float(number) for number in weights.split()[1::2]]
    sixteen, eight, four = peaks.values()
    assert four[0] == four[1] < eight[0] == eight[1] < sixteen[0] == sixteen[1] == four[2] == eight[2]
