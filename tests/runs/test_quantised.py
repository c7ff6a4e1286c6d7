"""Training runs over bases that bitsandbytes has quantised, with the stock arguments."""

import functools
from types import SimpleNamespace

import pytest
import quantised
import tiny
import torch
import training_script
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, from_delta, load_delta
from smt_trainer.config import SCORES
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import DELTA_FILE
from smt_trainer.sparse.block_module import block_modules

bnb = pytest.importorskip("bitsandbytes")
KINDS = list(quantised.KINDS)


def trainer_of(base, folder, kind="nf4", smt_config=None, data=None, **overrides):
    return tiny.smt_trainer(quantised.load(base, kind), folder, smt_config, data=data, **overrides)


def blocks_of(trainer):
    return {name: linear.blocks.detach().clone() for name, linear in block_modules(trainer.model)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_takes_a_quantised_model_and_trains_nothing_but_the_blocks(kind, base, tmp_path):
    trainer = trainer_of(base, tmp_path, kind)
    before = tiny.weights(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    tiny.assert_same({name: after[name] for name in before}, before)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert not trainer.model._hf_peft_config_loaded
    losses = tiny.logged(trainer, "loss")
    assert losses[-1] < losses[0]


def test_a_model_init_may_quantise(base, tmp_path):
    trainer = tiny.RecordingSMTTrainer(
        model_init=lambda: quantised.load(base, "nf4"),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.examples(),
        smt_config=tiny.config(),
    )
    trainer.train()
    assert not trainer.model._hf_peft_config_loaded
    assert len(list(block_modules(trainer.model)))


@pytest.mark.parametrize("score", sorted(SCORES))
def test_a_score_is_that_of_the_dequantised_model(score, base, tmp_path):
    smt_config = tiny.config(score=score)
    trainer = trainer_of(base, tmp_path, smt_config=smt_config)
    found = tiny.warm_up(trainer)
    trainer.model.dequantize()
    dense = tiny.smt_trainer(trainer.model, tmp_path, smt_config)
    expected = tiny.warm_up(dense)
    assert found.keys() == expected.keys()
    for name, scores in found.items():
        # Weight gradients are formed in bfloat16, by products of another shape.
        torch.testing.assert_close(scores, expected[name], rtol=2e-2, atol=1e-2 * expected[name].max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_where_the_uninterrupted_one_ended(kind, base, tmp_path):
    make = quantised.loader(base, kind)
    uninterrupted = training_script.resumable(tmp_path / "whole", make)
    uninterrupted.train()
    expected = training_script.result(uninterrupted)
    saved = (tmp_path / "whole" / "checkpoint-4").glob("*.safetensors")
    assert [path.name for path in saved] == [DELTA_FILE]
    resumed = training_script.resumable(tmp_path / "resumed", make)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    tiny.assert_same(training_script.result(resumed), expected)


def test_a_run_that_is_killed_and_resumed_ends_where_the_uninterrupted_one_ended(base, tmp_path):
    make = quantised.loader(base, "nf4")
    expected = training_script.resumable(tmp_path / "whole", make)
    expected.train()
    assert training_script.launch(tmp_path, moment="in the main loop", make=make) != [0]
    assert training_script.launch(tmp_path, make=make) == [0]
    (outcome,) = training_script.outcomes(tmp_path)
    ours, theirs = outcome, training_script.result(expected)
    tiny.assert_same(ours["blocks"], theirs["blocks"])
    tiny.assert_same(ours["optimizer"], theirs["optimizer"])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_like_one_process(base, tmp_path):
    make = quantised.loader(base, "nf4")
    fields = {"save_strategy": "no", "gradient_accumulation_steps": 1, "max_steps": 3, "optim": "sgd"}
    fields |= {"learning_rate": 1.0, "make": make, "ddp_find_unused_parameters": False}
    assert training_script.launch(tmp_path / "two", 2, per_device_train_batch_size=2, **fields) == [0, 0]
    assert training_script.launch(tmp_path / "one", 1, per_device_train_batch_size=4, **fields) == [0]
    (first, second), (single,) = (
        training_script.outcomes(tmp_path / "two", 2),
        training_script.outcomes(tmp_path / "one"),
    )
    for key in ("blocks", "block_indices", "weights"):
        tiny.assert_same(first[key], second[key])
    tiny.assert_same(first["block_indices"], single["block_indices"])
    for name, blocks in first["blocks"].items():
        # Gradients are in bfloat16.
        torch.testing.assert_close(blocks, single["blocks"][name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_activations_changes_nothing(kind, use_reentrant, base, tmp_path):
    plain = trainer_of(base, tmp_path / "plain", kind)
    plain.train()
    kwargs = {"use_reentrant": use_reentrant}
    checkpointed = trainer_of(
        base, tmp_path / "less", kind, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    checkpointed.train()
    tiny.assert_same(blocks_of(checkpointed), blocks_of(plain))
    assert checkpointed.losses == plain.losses


def test_evaluating_between_steps_changes_nothing(base, tmp_path):
    plain = trainer_of(base, tmp_path / "plain")
    plain.train()
    evaluating = tiny.smt_trainer(
        quantised.load(base, "nf4"),
        tmp_path / "evaluating",
        kind=training_script.Evaluated,
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluating.train()
    tiny.assert_same(blocks_of(evaluating), blocks_of(plain))


def test_what_is_saved_evaluates_as_the_run_did(base, tmp_path):
    trainer = tiny.smt_trainer(quantised.load(base, "int8"), tmp_path / "run", kind=training_script.Evaluated)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    model = from_delta(tmp_path / "run", base=base, quantization_config=quantised.config("int8"))
    again = tiny.smt_trainer(model, tmp_path / "again", kind=training_script.Evaluated)
    assert again.evaluate()["eval_loss"] == expected
    with pytest.raises(SMTError, match="'dequantized'"):
        trainer.merge_and_save(tmp_path / "merged")
    trainer.merge_and_save(tmp_path / "merged", onto="dequantized")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(trainer.model), rtol=0, atol=0.05)


# ---- optimizers of bitsandbytes ----

STATES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "adamw_torch": 8}


@pytest.mark.parametrize("optim", list(STATES))
def test_the_state_of_an_optimizer_takes_as_many_bytes_as_it_says(optim, base, tmp_path):
    # bitsandbytes keeps 32 bits for what has fewer than 4096 values.
    smt_config = tiny.config(block_size=32, budget=8, target_modules=["q_proj"])
    trainer = trainer_of(base, tmp_path, smt_config=smt_config, optim=optim)
    trainer.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.numel() for parameter in trained} == {4096}
    states = [trainer.optimizer.state[parameter] for parameter in trained]
    moments = [value for state in states for value in state.values() if getattr(value, "shape", None) == (4, 32, 32)]
    assert sum(value.nbytes for value in moments) == STATES[optim] * sum(each.numel() for each in trained)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_a_run_with_8_bit_states_resumes_where_it_was(optim, base, tmp_path):
    fields = {"optim": optim, "smt_config": tiny.config(block_size=32, budget=8, target_modules=["q_proj"])}
    make = quantised.loader(base, "nf4")
    whole = training_script.resumable(tmp_path / "whole", make, **fields)
    whole.train()
    resumed = training_script.resumable(tmp_path / "resumed", make, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    tiny.assert_same(training_script.result(resumed), training_script.result(whole))


# ---- other formats ----


def test_targets_that_another_format_left_plain_are_trained(llama, base, tmp_path):
    for layer in llama.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(
            layer.mlp.up_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
        )
        layer.mlp.up_proj.forward = functools.partial(widened_product, layer.mlp.up_proj)
    llama.hf_quantizer = SimpleNamespace(is_trainable=False, is_qat_trainable=False)
    llama.config.quantization_config = {"quant_method": "fp8"}
    trainer = tiny.smt_trainer(llama, tmp_path)
    trainer.train()
    assert tiny.logged(trainer, "loss")[-1] < tiny.logged(trainer, "loss")[0]
    trainer.save_model()
    assert Delta.load(tmp_path).quantization == {"quant_method": "fp8"}
    with pytest.raises(SMTError, match=r"trained on a quantised base \(fp8\)"):
        load_delta(tiny.llama(), tmp_path)


def widened_product(linear, x):
    return torch.nn.functional.linear(x, linear.weight.to(x.dtype))
