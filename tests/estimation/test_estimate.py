"""The estimate of a run against a real run on the CPU."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from mixtures import mixture
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

from smt_trainer import SMTConfig, SMTError, convert_to_smt, save_delta
from smt_trainer.cli import main
from smt_trainer.config import SCORES
from smt_trainer.estimation.estimate import estimate
from smt_trainer.estimation.meter import read_step
from smt_trainer.scores import make_scorer
from smt_trainer.scores.preserved import frozen

BATCH, LENGTH = 4, tiny.LENGTH
# Dropout masks are bytes only on a GPU.
WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS = {
    "llama": tiny.llama,
    "gpt2": lambda: tiny.gpt2(**WITHOUT_DROPOUT),
    "sliding": lambda: tiny.build("MistralForCausalLM", num_key_value_heads=2, sliding_window=4),
    "eager": lambda: tiny.llama(attn_implementation="eager"),
}


TOKENS = {"target_modules": ["embed_tokens"], "granularity": "row", "block_size": "auto"}


def guess(model, smt_config=None, **kwargs):
    """Estimate a run of a tiny model."""
    return estimate(
        model.config, smt_config or tiny.config(), batch=BATCH, seq=LENGTH, **{"dtype": torch.float32} | kwargs
    )


def real(model, found=None, dtype=torch.float32, checkpointing=False):
    """Return the model ready for a real step on the CPU, with the blocks of an estimate, if given."""
    model = model.to(dtype).train()
    if found is not None:
        convert_to_smt(model, found.selection)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        # The random state that it would keep is always on the CPU.
        enable({"use_reentrant": False, "preserve_rng_state": False})
        model.disable_input_require_grads()
    return model


# Numbers in arithmetic become tensors on a CPU, which allocates 16 bytes for each.
NUMBERS = 3 * 16


def step(model):
    """Run forward and backward; return the bytes allocated from the start until the output embeddings are reached."""

    def mark(*_):
        with torch.profiler.record_function("head"):
            pass

    handle = model.get_output_embeddings().register_forward_pre_hook(mark)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tokens = tiny.batch(BATCH)["input_ids"].clone()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    handle.remove()
    events = profile.profiler.kineto_results.events()
    head = next(event.start_ns() for event in events if event.name() == "head")
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.start_ns() < head)


def gradients(model):
    return sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)


def optimizer_state(model):
    """Return the bytes of a real AdamW's state after its first step."""
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activations_gradients_and_optimizer_are_those_of_a_real_step(name, checkpointing):
    found = guess(MODELS[name](), checkpointing=checkpointing)
    for cost, selection in ((found.smt, found), (found.full, None)):
        model = real(MODELS[name](), selection, checkpointing=checkpointing)
        assert 0 <= step(model) - cost.activations <= NUMBERS
        assert gradients(model) == cost.gradients
        assert optimizer_state(model) == cost.optimizer
        assert sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) == cost.weights + cost.added


def test_bfloat16_weights_have_float32_masters_and_bfloat16_moments_without_them():
    found = guess(tiny.llama(), dtype=torch.bfloat16)
    model = real(tiny.llama(), found, torch.bfloat16)
    assert 0 <= step(model) - found.smt.activations <= NUMBERS
    assert gradients(model) == found.smt.gradients == 4 * found.selection.trainable_parameters
    assert optimizer_state(model) == found.smt.optimizer
    full = real(tiny.llama(), dtype=torch.bfloat16)
    step(full)
    assert gradients(full) == found.full.gradients == 2 * found.full.trainable
    assert optimizer_state(full) == found.full.optimizer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_the_meta_device_counts_as_on_the_cpu(name, checkpointing):
    found = guess(MODELS[name](), checkpointing=checkpointing)
    for cost, selection in ((found.smt, found), (found.full, None)):
        reading = read_step(real(MODELS[name](), selection, checkpointing=checkpointing), BATCH, LENGTH)
        assert (reading.activations, reading.loss, reading.flops) == (cost.activations, cost.loss, cost.flops)
        assert reading.peak == cost.peak - cost.weights - cost.added - cost.optimizer


@pytest.mark.parametrize("score", SCORES[:-2])
def test_the_warm_up_counts_as_on_the_cpu(llama, score):
    warm_up_counts_as_on_the_cpu(llama, tiny.config(score=score))


def warm_up_counts_as_on_the_cpu(llama, smt_config):
    score = smt_config.score
    found = guess(llama, smt_config)
    targets = {name: llama.get_submodule(name) for name in found.selection.grids}
    scorer = make_scorer(targets, found.selection.grids, smt_config)
    scorer.begin_batch({"labels": torch.zeros(BATCH, dtype=torch.long)})
    sums = list(scorer.statistics())
    if not scorer.needs_backward:
        llama.register_forward_hook(lambda _, __, output: output.loss.requires_grad_() and None)
    with frozen(llama.train()), scorer.attached():
        reading = read_step(llama, BATCH, LENGTH, beside=sums)
    assert sum(total.nbytes for total in sums) == found.accumulators[score] == found.warmup.added
    assert reading.activations == found.warmup.activations
    assert reading.peak == found.warmup.peak - found.warmup.weights - found.warmup.added
    assert found.warmup.optimizer == found.warmup.gradients == found.warmup.trainable == 0


def test_the_scores_differ_in_what_a_warm_up_takes(llama):
    found = {score: guess(llama, tiny.config(score=score)) for score in SCORES[:-2]}
    grids = found["grad_l1"].selection.grids.values()
    weights = sum(math.prod(grid.weight_shape) for grid in grids)
    blocks, columns = sum(grid.num_blocks for grid in grids), sum(grid.shape[1] for grid in grids)
    numbers = {"grad_l1": weights, "grad_l2": weights, "activation": columns, "low_activation": columns}
    for score, size in found["grad_l1"].accumulators.items():
        # `qm_taylor` also counts the examples of its one class.
        expected = 4 * numbers.get(score, blocks) + 8 * (score == "qm_taylor")
        assert size == (expected if score in found else 0)
    halved = guess(llama, tiny.config(accumulator_dtype="bfloat16")).accumulators
    assert halved == found["grad_l1"].accumulators | {score: 2 * weights for score in ("grad_l1", "grad_l2")}
    # Forward alone; one more product for each weight gradient.
    assert found["activation"].warmup.flops < found["grad_signed"].warmup.flops < found["taylor"].warmup.flops
    assert found["taylor"].warmup.flops == found["grad_l1"].warmup.flops == found["qm_taylor"].warmup.flops


def test_sums_on_the_cpu_are_not_on_the_device(llama):
    on_device, on_cpu = (guess(llama, tiny.config(accumulator_device=device)).warmup for device in ("device", "cpu"))
    assert on_cpu.added == 0 and on_cpu.peak == on_device.peak - on_device.added


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_score_without_warm_up_has_no_warm_up_cost(llama, score):
    found = guess(llama, tiny.config(score=score))
    assert found.warmup is None and found.accumulators[score] == 0
    assert found.peak == found.smt.peak


def test_given_blocks_are_those_estimated(llama):
    selection = tiny.choose(llama)
    found = guess(llama, tiny.config(selection=selection))
    assert found.selection is selection and found.warmup is None


def test_the_delta_is_as_large_as_estimated_except_for_its_header(llama, tmp_path):
    found = guess(llama, tiny.config(modules_to_save=["norm"]), dtype=torch.bfloat16)
    save_delta(real(llama, found, torch.bfloat16), tmp_path)
    written = (tmp_path / "smt_delta.safetensors").read_bytes()
    assert len(written) - 8 - int.from_bytes(written[:8], "little") == found.delta


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=lambda build: build.__name__)
def test_flops_are_those_that_torch_counts(build):
    overrides = {"attn_implementation": "eager"} | (WITHOUT_DROPOUT if build is tiny.gpt2 else {})
    found = guess(build(**overrides))
    for cost, selection in ((found.smt, found), (found.full, None)):
        with FlopCounterMode(display=False) as counter:
            step(real(build(**overrides), selection))
        assert counter.get_total_flops() == cost.flops


def test_a_block_adds_the_flops_of_its_own_gradient(llama):
    few, many = (guess(llama, tiny.config(budget=count, target_modules=["1.self_attn.v_proj"])) for count in (1, 8))
    assert many.smt.flops - few.smt.flops == 7 * 2 * BATCH * LENGTH * 16 * 16


def test_fused_attention_computes_its_scores_twice():
    fused, eager = guess(MODELS["llama"]()).full.flops, guess(MODELS["eager"]()).full.flops
    assert fused - eager == 2 * 2 * BATCH * 64 * LENGTH**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, TOKENS], ids=["linears", "embedding"])
def test_lora_is_that_of_peft(fields, dtype):
    peft = pytest.importorskip("peft")
    llama = tiny.llama(tie_word_embeddings=False)
    found = guess(llama, tiny.config(**fields), dtype=dtype)
    lora = peft.LoraConfig(
        r=found.lora_rank, target_modules=fields.get("target_modules", ["q_proj", "k_proj", "v_proj"])
    )
    model = peft.get_peft_model(llama.to(dtype).train(), lora)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == found.lora.trainable
    assert 0 <= step(model) - found.lora.activations <= NUMBERS
    assert gradients(model) == found.lora.gradients == found.lora.added


def test_lora_trains_as_many_parameters_as_whole_ranks_allow(llama):
    found = guess(llama)
    one_rank = sum(sum(grid.weight_shape) for grid in found.selection.grids.values())
    assert abs(found.lora.trainable - found.smt.trainable) <= one_rank / 2
    assert found.smt.trainable == found.selection.trainable_parameters


def test_ranks_share_what_zero_lets_them(llama):
    alone = guess(llama)
    parts = ("weights", "added", "optimizer", "gradients")
    shares = {0: (1, 1, 1, 2), 1: (1, 1, 1 / 4, 1), 2: (1, 1, 1 / 4, 1 / 4), 3: (1 / 4, 1 / 4, 1 / 4, 1 / 4)}
    for stage, expected in shares.items():
        found = guess(llama, ranks=4, zero_stage=stage)
        for part, share in zip(parts, expected, strict=True):
            for method in ("smt", "lora", "full"):
                assert getattr(getattr(found, method), part) == round(share * getattr(getattr(alone, method), part))
    full = {stage: guess(llama, ranks=4, zero_stage=stage).full.peak for stage in range(4)}
    assert full[0] > full[1] > full[2] > full[3]
    assert guess(llama, ranks=1, zero_stage=3).smt == alone.smt


def test_torch_is_left_as_it_was(llama, monkeypatch):
    before = F.scaled_dot_product_attention, torch.is_autocast_enabled
    guess(llama)
    monkeypatch.setattr(type(llama), "forward", lambda *_, **__: torch.zeros(1, device="meta").nonzero())
    with pytest.raises(SMTError, match="LlamaForCausalLM cannot run on the meta device"):
        guess(llama)
    assert (F.scaled_dot_product_attention, torch.is_autocast_enabled) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no/such folder"}, "no causal language model can be built from no/such folder"),
        ({"model": T5Config()}, "no causal language model can be built from T5Config"),
        ({"config": SMTConfig(budget=10**6)}, "more than the targets hold"),
        ({"config": SMTConfig(target_modules=["experts"])}, "matches no linear"),
        (
            {"model": mixture().config, "config": SMTConfig(target_modules="experts", block_size=16)},
            "`model.layers.0.mlp.experts.gate_up_proj.0` gets as many tokens as a router sends",
        ),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"ranks": -1}, "ranks must be at least 1, got -1"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_bad_input_is_refused(llama, arguments, message):
    with pytest.raises(SMTError, match=message):
        estimate(**{"model": llama.config, "config": tiny.config(block_size=16)} | arguments)


def test_the_command_reads_the_configuration_alone(base, capsys):
    for path in base.glob("*.safetensors"):
        path.unlink()
    options = ["--target-modules", "q_proj", "v_proj", "--budget", "12", "--block-size", "16", "--batch", "2"]
    assert main(["estimate", str(base), *options, "--dtype", "float32", "--checkpointing"]) == 0
    output = capsys.readouterr().out
    assert "12 blocks of 16x16 (3,072 parameters)" in output
    assert "delta        12.09 KiB on disk" in output
    assert "fits a 24 GiB card: yes, 24.00 GiB to spare" in output
    columns = next(line for line in output.splitlines() if line.startswith("each device"))
    assert columns.split() == ["each", "device", "SMT", "warm-up", "LoRA", "r=7", "full"]


def test_the_command_says_how_much_memory_a_card_lacks(base, capsys):
    assert main(["estimate", str(base), "--budget", "0.05", "--score", "random", "--card", "0.0001"]) == 0
    output = capsys.readouterr().out
    assert "fits a 0.0001 GiB card: no, " in output and "too much" in output
    assert "warm-up  " not in output


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["estimate", str(tmp_path)]) == 2
    assert main(["estimate", str(tmp_path), "--budget", "much"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"smt: no causal language model can be built from {tmp_path}")
    assert errors[1].startswith("smt: budget must be a count of blocks")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smt", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_a_profiled_step(method, dtype):
    sizes = {"num_hidden_layers": 8, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
    model_config = LlamaConfig(**sizes, vocab_size=8192)
    found = estimate(model_config, SMTConfig(), batch=8, seq=256, dtype=dtype)
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype).train()
    if method == "smt":
        convert_to_smt(model, found.selection)
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    tokens = torch.randint(8192, (8, 256))
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    resident = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())]
    measured = peak + sum(tensor.nbytes for tensor in resident)
    assert getattr(found, method).peak == pytest.approx(measured, rel=0.01)


def test_columns_that_depend_on_rows_are_counted_as_training_counts_them(tmp_path):
    config = tiny.config(
        block_size="auto", granularity="row", target_modules=["v_proj"], budget=8, train_dependents=True
    )
    model = tiny.llama()
    trained = tiny.smt_trainer(model, tmp_path, replace(config, score="random"), max_steps=1)
    trained.train()
    found = guess(model, config)
    assert found.smt.trainable == trained.smt_selection.trainable_parameters > 8 * 64
    assert found.selection.grids == trained.smt_selection.grids


def test_blocks_in_convolutions_are_refused():
    model = tiny.build("MambaForCausalLM", state_size=4, time_step_rank=4)
    with pytest.raises(SMTError, match=r"`backbone.layers.0.mixer.conv1d` is a convolution, and the cost of training"):
        guess(model, tiny.config(target_modules="all-conv", granularity="row", block_size="auto", budget=4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [TOKENS, {"target_modules": ["embed_tokens", "q_proj"]}], ids=["rows", "blocks"])
def test_a_step_of_rows_of_embeddings_is_a_real_one(fields, tied):
    found = guess(tiny.llama(tie_word_embeddings=tied), tiny.config(**fields))
    cost, model = found.smt, real(tiny.llama(tie_word_embeddings=tied), found)
    assert 0 <= step(model) - cost.activations <= NUMBERS
    assert gradients(model) == cost.gradients
    assert optimizer_state(model) == cost.optimizer
    assert sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) == cost.weights + cost.added
    reading = read_step(real(tiny.llama(tie_word_embeddings=tied), found), BATCH, LENGTH)
    assert (reading.activations, reading.loss, reading.flops) == (cost.activations, cost.loss, cost.flops)
    assert reading.peak == cost.peak - cost.weights - cost.added - cost.optimizer


@pytest.mark.parametrize("score", ["grad_l1", "grad_signed", "taylor", "activation"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_warm_up_of_embeddings_counts_as_on_the_cpu(score, tied):
    warm_up_counts_as_on_the_cpu(tiny.llama(tie_word_embeddings=tied), tiny.config(score=score, **TOKENS))


def test_embeddings_that_are_sharded_are_refused():
    with pytest.raises(SMTError, match=r"`model.embed_tokens` is an embedding, .* under ZeRO-3 is not estimated"):
        guess(tiny.llama(), tiny.config(**TOKENS), ranks=2, zero_stage=3)
