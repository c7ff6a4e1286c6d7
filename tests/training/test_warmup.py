"""The gradient warm-up: it scores correctly and leaves no trace."""

import random

import datasets
import numpy as np
import pytest
import tiny
import torch
from reference import block_scores, summed_gradients
from torch import nn

from smt_trainer import BlockScores, BlockSelection, SMTError
from smt_trainer.config import SCORES
from smt_trainer.scores import SCORERS
from smt_trainer.scores.preserved import frozen
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.training.preserved import rng_preserved
from smt_trainer.training.trainer import SCORES_FILE, SELECTION_FILE

WARMUP_SCORES = SCORES[:-2]
GRADIENT_SCORES = [score for score in WARMUP_SCORES if SCORERS[score].needs_backward]
QKV = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv"]


def dropping_llama(**overrides):
    """Make a model whose forward draws random numbers."""
    return tiny.llama(attention_dropout=0.3, **overrides)


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# ---- no trace ----


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_the_warm_up_leaves_weights_gradients_flags_and_random_states_as_they_were(score, tmp_path):
    model = dropping_llama()
    model.lm_head.requires_grad_(False)
    trainer = tiny.smt_trainer(model, tmp_path, tiny.config(score=score), gradient_accumulation_steps=2)
    before, states = tiny.weights(model), random_states()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tiny.warm_up(trainer)
    assert random_states() == states
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


MAIN_LOOPS = {
    "plain": {},
    "accumulation of 3": {"gradient_accumulation_steps": 3},
    "data_seed": {"data_seed": 7},
    "worker": {"dataloader_num_workers": 1},
    "sequential": {"train_sampling_strategy": "sequential"},
    "epochs and drop_last": {"dataloader_drop_last": True, "num_train_epochs": 2, "max_steps": -1},
    "epochs shorter than the warm-up": {
        "num_train_epochs": 2,
        "max_steps": -1,
        "gradient_accumulation_steps": 2,
        "data": lambda: tiny.examples(10),
    },
    "group_by_length": {
        "train_sampling_strategy": "group_by_length",
        "data": tiny.ragged_examples,
        "collator": tiny.pad,
    },
    "IterableDataset": {"data": lambda: tiny.Stream(tiny.examples(10))},
    "shuffled IterableDataset of datasets": {
        "data": lambda: datasets.Dataset.from_list(tiny.examples()).to_iterable_dataset().shuffle(seed=5, buffer_size=8)
    },
}


@pytest.mark.parametrize("case", MAIN_LOOPS.values(), ids=MAIN_LOOPS)
def test_the_main_loop_sees_the_same_as_on_the_stock_trainer(case, tmp_path):
    runs = []
    for make in (tiny.stock_trainer, tiny.smt_trainer):
        overrides = case | ({"data": case["data"]()} if "data" in case else {})
        if make is tiny.smt_trainer:
            overrides["smt_config"] = tiny.config(smt_warmup_steps=4)
        torch.manual_seed(11)
        trainer = make(dropping_llama(), tmp_path, warmup_steps=1, **overrides)
        trainer.train()
        runs.append(trainer)
    stock, ours = runs
    assert len(ours.inputs) == len(stock.inputs) > 0
    assert all(torch.equal(*pair) for pair in zip(ours.inputs, stock.inputs, strict=True))
    assert all(torch.equal(*pair) for pair in zip(ours.random_states, stock.random_states, strict=True))
    assert tiny.logged(ours, "learning_rate") == tiny.logged(stock, "learning_rate")
    assert ours.state.global_step == stock.state.global_step
    assert ours.state.epoch == stock.state.epoch
    assert ours.losses[0] == stock.losses[0] and ours.losses[-1] != ours.losses[0]


class Failing(tiny.RecordingSMTTrainer):
    """Fails once, in the second warm-up step."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        type(self).calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_a_failed_warm_up_leaves_no_trace_and_can_be_run_again(score, tmp_path):
    model = dropping_llama()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = tiny.smt_trainer(model, tmp_path, tiny.config(score=score), kind=type("", (Failing,), {}))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, parameter in model.named_parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
        assert parameter.grad is None and parameter.requires_grad is flags[name]

    trainer.train()
    undisturbed = tiny.smt_trainer(dropping_llama(), tmp_path, tiny.config(score=score))
    undisturbed.train()
    assert trainer.losses == undisturbed.losses


def test_frozen_restores_the_flags_after_an_exception(llama):
    llama.lm_head.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(llama):
        assert not any(parameter.requires_grad for parameter in llama.parameters())
        raise RuntimeError
    assert [name for name, parameter in llama.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


def test_random_states_are_restored_after_an_exception():
    states = random_states()
    with pytest.raises(RuntimeError), rng_preserved():
        random.random(), np.random.rand(), torch.rand(1)
        assert all(ours != before for ours, before in zip(random_states(), states, strict=True))
        raise RuntimeError
    assert random_states() == states


# ---- right scores ----

TWINS = {"grad_l1": lambda block: block.abs().mean(), "grad_signed": lambda block: block.mean().abs()}


def shares(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove a common factor, which differs between releases of transformers and changes no ranking."""
    total = sum(score.sum() for score in scores.values())
    return {name: score / total for name, score in scores.items()}


def first_batches(trainer, count: int) -> list[dict[str, torch.Tensor]]:
    loader = iter(trainer.get_train_dataloader())
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("score", TWINS)
def test_the_warm_up_scores_the_gradients_of_the_main_loops_first_batches(score, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama().double(), tmp_path, tiny.config(score=score, smt_warmup_steps=3))
    grids = find_candidates(trainer.model, trainer.smt_config).grids
    gradients = summed_gradients(tiny.llama().double(), QKV, first_batches(trainer, 3))
    expected = {name: block_scores(gradients[name], grids[name], TWINS[score]).float() for name in QKV}
    # Sums are kept in float32, and the loss is computed in it.
    torch.testing.assert_close(shares(tiny.warm_up(trainer)), shares(expected), rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize("score", WARMUP_SCORES)
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 1e-4),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-6),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 1e-6),
        # Eight bits of mantissa, forward and backward through two layers.
        ({"bf16": True}, 2**-5),
    ],
    ids=["accumulation", "reentrant", "non-reentrant", "bf16"],
)
def test_how_a_step_is_computed_does_not_change_the_scores(score, overrides, tolerance, tmp_path):
    if score == "grad_abs" and "gradient_accumulation_steps" in overrides:
        pytest.skip("only this score depends on how a step is split")
    smt_config = tiny.config(score=score)
    expected = tiny.warm_up(tiny.smt_trainer(tiny.llama(), tmp_path, smt_config))
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, smt_config, **overrides)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    largest = max(scores.max() for scores in shares(expected).values()).item()
    torch.testing.assert_close(shares(tiny.warm_up(trainer)), shares(expected), rtol=0, atol=tolerance * largest)


def test_a_last_step_of_fewer_micro_batches_counts_as_much_as_a_whole_one(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, data=tiny.examples(12), gradient_accumulation_steps=2)
    trainer.model_accepts_loss_kwargs = False  # like a model whose loss is the mean over its batch
    grids = find_candidates(trainer.model, trainer.smt_config).grids
    batches = first_batches(trainer, 3)
    whole, last = (summed_gradients(tiny.llama(), QKV, part) for part in (batches[:2], batches[2:]))
    expected = {name: block_scores(whole[name] / 2 + last[name], grids[name], TWINS["grad_l1"]) for name in QKV}
    torch.testing.assert_close(shares(tiny.warm_up(trainer)), shares(expected), rtol=1e-4, atol=5e-7)


def test_the_warm_up_runs_under_the_autocast_of_the_main_loop(tmp_path):
    dtypes = []
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, bf16=True, max_steps=1)
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.train()
    assert dtypes == [torch.bfloat16] * 3


# ---- fp16: scaled loss, steps that overflow ----


class Overflowing(tiny.RecordingSMTTrainer):
    """Pretends to the warm-up that it runs under fp16; multiplies the losses of its steps by `factors`."""

    factors = (1.0, 1.0, 1.0)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.state._mixed_precision = "fp16"
        self.count = 0

    def compute_loss(self, *args, **kwargs):
        self.count += 1
        return super().compute_loss(*args, **kwargs) * self.factors[(self.count - 1) // 2]


def fp16_scores(factors, folder, score):
    kind = type("Overflowing", (Overflowing,), {"factors": factors})
    smt_config = tiny.config(score=score, smt_warmup_steps=len(factors))
    return tiny.warm_up(tiny.smt_trainer(tiny.llama(), folder, smt_config, kind, gradient_accumulation_steps=2))


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_the_loss_scale_does_not_change_the_scores(score, tmp_path):
    smt_config = tiny.config(score=score, smt_warmup_steps=3)
    plain = tiny.smt_trainer(tiny.llama(), tmp_path, smt_config, gradient_accumulation_steps=2)
    torch.testing.assert_close(fp16_scores((1.0, 1.0, 1.0), tmp_path, score), tiny.warm_up(plain))


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_a_step_that_overflows_does_not_count(score, tmp_path, caplog):
    caplog.set_level("INFO", logger="smt_trainer")
    overflowed = fp16_scores((1.0, 1.0, 1e38), tmp_path, score)
    assert "1 of 3 warm-up steps overflowed under fp16" in caplog.text
    torch.testing.assert_close(overflowed, fp16_scores((1.0, 1.0), tmp_path, score))


def test_a_step_that_overflows_halves_the_scale_of_later_steps(tmp_path):
    overflowed = fp16_scores((1.0, 1e38, 1.0), tmp_path, "grad_l1")
    torch.testing.assert_close(overflowed, fp16_scores((1.0, 0.0, 1.0), tmp_path, "grad_l1"))


def test_a_warm_up_that_overflows_in_every_step_is_an_error(tmp_path):
    with pytest.raises(SMTError, match=r"overflowed in all 3 warm-up steps .* loss scale of 8192"):
        fp16_scores((1e38, 1e38, 1e38), tmp_path, "grad_l1")


# ---- bad input ----


def test_labels_that_are_all_masked_are_refused(tmp_path):
    data = [item | {"labels": torch.full_like(item["labels"], -100)} for item in tiny.examples()]
    with pytest.raises(SMTError, match="all scores are zero"):
        tiny.smt_trainer(tiny.llama(), tmp_path, data=data).train()


def test_a_model_with_nan_is_refused_naming_a_module(tmp_path):
    model = tiny.llama()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(SMTError, match=r"scores of `model\.layers\.0\.self_attn\.q_proj` are not finite"):
        tiny.smt_trainer(model, tmp_path).train()


def test_data_without_a_batch_are_refused(tmp_path):
    with pytest.raises(SMTError, match="the training data gave no batch"):
        tiny.smt_trainer(tiny.llama(), tmp_path, data=tiny.examples(3), dataloader_drop_last=True).train()


def test_a_linear_that_is_called_by_keyword_is_scored_and_trained_alike(tmp_path):
    def by_keyword(module, name):
        linear = getattr(module, name)
        module._modules[name] = Keyword(linear)

    class Keyword(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(input=x)

    plain, named = tiny.llama(), tiny.llama()
    for layer in named.model.layers:
        by_keyword(layer.self_attn, "v_proj")
    runs = [
        tiny.smt_trainer(model, tmp_path / name, tiny.config(target_modules=rf".*v_proj{ending}"))
        for model, name, ending in ((plain, "plain", ""), (named, "named", r"\.linear"))
    ]
    for run in runs:
        run.train()
    assert runs[0].losses == runs[1].losses


# ---- the artefact ----


def test_the_selection_of_a_run_can_be_used_again_without_a_warm_up(tmp_path):
    first = tiny.smt_trainer(tiny.llama(), tmp_path / "first")
    first.train()
    path = tmp_path / "first" / SELECTION_FILE
    # These fields would fit no model, but a selection overrides them.
    smt_config = tiny.config(selection=path, budget=10_000)
    second = tiny.smt_trainer(tiny.llama(), tmp_path / "second", smt_config)
    second.train()
    assert tiny.logged(second, "smt_warmup_steps") == []
    assert second.losses == first.losses
    chosen = BlockSelection.load(path).block_indices
    assert second.model.smt_state.selection.block_indices.keys() == chosen.keys()
    for name, indices in second.model.smt_state.selection.block_indices.items():
        assert np.array_equal(indices, chosen[name])


def test_another_budget_can_be_chosen_from_the_scores_of_a_run_without_a_warm_up(tmp_path):
    tiny.smt_trainer(tiny.llama(), tmp_path / "first").train()
    fields = {"budget": {"v_proj": 3, "q_proj": 2}, "target_modules": ["q_proj", "v_proj"]}
    other = tiny.smt_trainer(tiny.llama(), tmp_path / "other", tiny.config(**fields))
    other.train()
    smt_config = tiny.config(selection=tmp_path / "first" / SCORES_FILE, **fields)
    again = tiny.smt_trainer(tiny.llama(), tmp_path / "again", smt_config)
    again.train()
    assert tiny.logged(again, "smt_warmup_steps") == [] and again.losses == other.losses
    assert again.smt_selection.to_dict() == other.smt_selection.to_dict()


@pytest.mark.parametrize("training", [False, True])
def test_select_chooses_what_training_would_and_leaves_the_model_and_the_run_as_they_were(training, tmp_path):
    model = tiny.llama().train(training)
    trainer = tiny.smt_trainer(model, tmp_path / "selected")
    before, states = tiny.weights(model), random_states()
    selection = trainer.select()
    assert random_states() == states
    assert not is_smt_model(model) and model.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.weights(model).items())
    assert BlockSelection.load(tmp_path / "selected" / SELECTION_FILE).to_dict() == selection.to_dict()
    assert BlockScores.load(tmp_path / "selected" / SCORES_FILE).select().to_dict() == selection.to_dict()
    twin = tiny.smt_trainer(tiny.llama(), tmp_path / "trained")
    for run in (trainer, twin):
        run.train()
    assert trainer.losses == twin.losses
    assert twin.smt_selection.to_dict() == selection.to_dict()
    with pytest.raises(SMTError, match="trains blocks already"):
        trainer.select()


def test_another_configuration_of_a_trainer_is_obeyed(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path)
    trainer.select()
    trainer.smt_config = tiny.config(target_modules=["up_proj"], block_size=32, budget=2)
    chosen = trainer.select()
    assert chosen.blocks_by_projection() == {"up_proj": 2}
    assert {grid.block_shape for grid in chosen.grids.values()} == {(32, 32)}
    trainer.smt_config = tiny.config(selection=tiny.choose(tiny.llama()))
    assert trainer.select().blocks_by_projection().keys() == {"q_proj", "k_proj", "v_proj"}
    trainer.smt_config = tiny.config(selection=chosen)
    trainer.train()
    assert trainer.smt_selection.blocks_by_projection() == {"up_proj": 2}


def test_scores_of_another_model_are_refused_when_the_trainer_is_made(tmp_path):
    tiny.smt_trainer(tiny.llama(), tmp_path).select()
    with pytest.raises(SMTError, match=r"scores of `model\.layers\.0\.self_attn\.q_proj` are of a weight of 64x64"):
        tiny.smt_trainer(tiny.llama(hidden_size=32), tmp_path, tiny.config(selection=tmp_path / SCORES_FILE))


def test_a_budget_that_fits_no_layer_cap_is_refused_before_the_warm_up(tmp_path):
    with pytest.raises(SMTError, match=r"more than the targets hold under layer_cap=5 \(10\)"):
        tiny.smt_trainer(tiny.llama(), tmp_path, tiny.config(layer_cap=5))


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_scores_of_the_weights_need_no_warm_up(score, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, tiny.config(score=score))
    trainer.train()
    assert tiny.logged(trainer, "smt_warmup_steps") == [] and tiny.logged(trainer, "smt_blocks") == [12]
