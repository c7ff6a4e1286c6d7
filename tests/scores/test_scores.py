"""Scorers against scores computed from full weight gradients, block by block."""

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    block_scores,
    examples_of_class,
    inputs_of_linears,
    quantile_mean,
    summed_gradients,
    taylor,
)
from torch import nn

from smt_trainer import BlockScores, SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import SCORERS, make_scorer
from smt_trainer.scores.block_sums import add_block_sums
from smt_trainer.scores.classes import predicts_next_token
from smt_trainer.scores.preserved import frozen

OF_SUMMED_GRADIENT = {
    "grad_l1": lambda block: block.abs().mean(),
    "grad_l2": lambda block: block.square().sum().sqrt(),
    "grad_signed": lambda block: block.mean().abs(),
}
GRADIENT_SCORES = [*OF_SUMMED_GRADIENT, "grad_abs", "taylor", "qm_taylor"]
# Scores that are the same for a batch and for its parts.
LINEAR_SCORES = [*OF_SUMMED_GRADIENT, "taylor", "qm_taylor"]
INPUT_SCORES = ["activation", "low_activation"]
WARMUP_SCORES = [*GRADIENT_SCORES, *INPUT_SCORES]
CLASSES = torch.tensor([5, 7, 5, 9])
CUTS = {
    "squares": {},
    "rectangles": {"block_size": (32, 16)},
    "rows": {"granularity": "row", "block_size": "auto"},
    "columns": {"granularity": "column", "block_size": "auto"},
}
NO_CONTEXT = contextlib.nullcontext()
CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}


def scorer_for(model, score="grad_l1", seed=0, **fields):
    smt_config = tiny.config(score=score, **fields)
    targets = find_targets(model, smt_config)
    return make_scorer(targets, target_grids(targets, smt_config), smt_config, seed)


def batches_of(model, count=3):
    """Make batches of four examples in three classes, two examples in one of them."""
    if "Classification" in type(model).__name__:
        return [{"input_ids": tiny.tokens(4, seed=seed), "labels": CLASSES % 3} for seed in range(count)]
    batches = [tiny.batch(4, seed=seed) for seed in range(count)]
    # No model predicts the first token.
    return [inputs | {"labels": torch.cat([CLASSES[:, None], inputs["labels"][:, 1:]], 1)} for inputs in batches]


def classes_of(inputs):
    return inputs["labels"] if inputs["labels"].ndim == 1 else inputs["labels"][:, 0]


def observe(model, scorer, batches=None, context=NO_CONTEXT):
    scorer.predicts_next = predicts_next_token(model)
    with frozen(model), scorer.attached():
        for inputs in batches or (batches_of(model) if scorer.needs_warmup else []):
            scorer.begin_batch(inputs)
            with context:
                loss = model(**inputs).loss
            if scorer.needs_backward:
                loss.backward()
    return scorer.scores()


def twin_scores(model, scorer, score, batches):
    grids, gradients = scorer.grids, summed_gradients(model, scorer.targets, batches)
    if score in OF_SUMMED_GRADIENT:
        return {name: block_scores(gradients[name], grids[name], OF_SUMMED_GRADIENT[score]) for name in grids}
    if score == "grad_abs":
        each = [summed_gradients(model, grids, [inputs]) for inputs in batches]
        return {name: sum(block_scores(g[name], grids[name], lambda b: b.abs().mean()) for g in each) for name in grids}
    if score in INPUT_SCORES:
        seen, power = inputs_of_linears(model, grids, batches), 1 if score == "activation" else -1
        norms = {
            name: torch.stack([part.norm() for part in seen[name].split(grid.block_columns, 1)])
            for name, grid in grids.items()
        }
        return {name: norms[name].pow(power).repeat(grid.shape[0], 1) for name, grid in grids.items()}
    weights = {name: linear.weight for name, linear in scorer.targets.items()}
    if score == "taylor":
        return {name: taylor(weights[name], gradients[name], grids[name]) for name in grids}
    by_class = []
    for label in torch.cat([classes_of(inputs) for inputs in batches]).unique():
        parts = [examples_of_class(inputs, classes_of(inputs), label) for inputs in batches]
        mine = [summed_gradients(model, grids, [inputs]) for inputs, share in parts if share]
        shares = [share for _, share in parts if share]
        weight = len(batches) / sum(shares)
        total = {name: sum(s * g[name] for s, g in zip(shares, mine, strict=True)) for name in grids}
        by_class.append({name: weight * taylor(weights[name], total[name], grids[name]) for name in grids})
    return {name: quantile_mean([scores[name] for scores in by_class]) for name in grids}


def assert_close(scores, expected, tolerance):
    """Compare up to rounding, relative to the largest score: terms cancel, after a LayerNorm in whole rows."""
    for name, twin in expected.items():
        atol = max(1e-8, tolerance * twin.max().item())
        torch.testing.assert_close(scores[name], twin.float(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.albert])
@pytest.mark.parametrize("score", WARMUP_SCORES)
@pytest.mark.parametrize("fields", CUTS.values(), ids=CUTS)
# All scorers sum in float32, whatever the model's dtype.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_scores_equal_their_definition_on_full_gradients(make, score, fields, dtype, tolerance):
    model = make().to(dtype)
    scorer, batches = scorer_for(model, score, **fields), batches_of(model)
    expected = twin_scores(model, scorer, score, batches)
    assert_close(observe(model, scorer, batches), expected, tolerance)


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_gradient_checkpointing_does_not_change_scores(score, reentrant):
    plain, model = tiny.llama(), tiny.llama().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, scores = (observe(each, scorer_for(each, score)) for each in (plain, model))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_scores_under_bfloat16_autocast_stay_within_bfloat16_of_float32(score, llama):
    expected = observe(llama, scorer_for(llama, score))
    scores = observe(llama, scorer_for(llama, score), context=torch.autocast("cpu", torch.bfloat16))
    largest = max(score.max() for score in expected.values()).item()
    # Eight bits of mantissa, through two layers forward and backward.
    torch.testing.assert_close(scores, expected, rtol=0, atol=largest * 2**-5)


@pytest.mark.parametrize("score", [*LINEAR_SCORES, *INPUT_SCORES])
def test_a_batch_scores_like_its_halves_weighted_by_their_tokens(score):
    model = tiny.llama().double()
    (whole,), predicted = batches_of(model, 1), 4 * (tiny.LENGTH - 1)
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(2), slice(2, 4))]
    cut = observe(model, scorer_for(model, score), [half | {"num_items_in_batch": predicted} for half in halves])
    assert_close(cut, observe(model, scorer_for(model, score), [whole]), 1e-5)


def test_a_block_that_no_input_reaches_could_not_learn_and_comes_last(llama):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[:16] = 0
    scores = observe(llama, scorer_for(llama, "low_activation"))["model.layers.0.self_attn.q_proj"]
    assert (scores[:, 0] == 0).all() and (scores[:, 1:] > 0).all()


def test_grad_abs_grows_as_a_batch_is_cut(llama):
    (whole,) = batches_of(llama, 1)
    parts = [{key: value[[row]] for key, value in whole.items()} | {"num_items_in_batch": 44} for row in range(4)]
    cut, uncut = (observe(llama, scorer_for(llama, "grad_abs"), batches) for batches in (parts, [whole]))
    assert all((cut[name] > uncut[name]).all() for name in cut)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_single_class_scores_as_taylor_does(make):
    model = make()
    batches = [inputs | {"labels": inputs["labels"].index_fill(1, torch.tensor(0), 3)} for inputs in batches_of(model)]
    expected = observe(model, scorer_for(model, "taylor"), batches)
    assert_close(observe(model, scorer_for(model, "qm_taylor"), batches), expected, 1e-5)


@pytest.mark.parametrize("first_has_label", [False, True])
def test_a_class_weighs_by_its_mean_loss_however_long_its_examples_are(first_has_label):
    """Eq. 6 of SPSFT takes the mean loss of each class; here one class has two labelled tokens, the other eight."""
    model = tiny.llama().double()
    (inputs,) = batches_of(model, 1)
    labels = inputs["labels"].clone()
    labels[:2, :2], labels[2:, :2] = 3, 4
    if not first_has_label:
        labels[:, 0] = -100
    labels[:2, 3:], labels[2:, 9:] = -100, -100
    scores = observe(model, scorer_for(model, "qm_taylor"), [inputs | {"labels": labels}])
    grids = scorer_for(model, "qm_taylor").grids
    taylors = []
    for part in (slice(2), slice(2, 4)):
        own = [{key: value[part] for key, value in (inputs | {"labels": labels}).items()}]
        gradients = summed_gradients(model, list(grids), own)
        taylors.append({name: taylor(model.get_submodule(name).weight, gradients[name], grids[name]) for name in grids})
    expected = {name: quantile_mean([one[name] for one in taylors]).float() for name in grids}
    assert_close(scores, expected, 1e-5)


def test_examples_without_a_label_have_no_class(llama):
    batches = batches_of(llama)
    rows = torch.cat([inputs["input_ids"] for inputs in batches])
    unlabelled = [
        {key: torch.cat([value, padding]) for (key, value), padding in zip(inputs.items(), fill, strict=True)}
        for inputs in batches
        for fill in [(rows[:2], torch.full_like(rows[:2], -100))]
    ]
    expected = observe(llama, scorer_for(llama, "qm_taylor"), batches)
    assert_close(observe(llama, scorer_for(llama, "qm_taylor"), unlabelled), expected, 1e-5)


def test_packed_examples_are_refused(llama):
    scorer = scorer_for(llama, "qm_taylor")
    with pytest.raises(SMTError, match=r"q_proj` should get 2 examples, got shape \[1, 12, 64\]"):
        scorer.begin_batch({"labels": torch.tensor([0, 1])})
        with frozen(llama), scorer.attached():
            llama(**tiny.batch(1))


@given(st.data())
def test_the_parts_of_a_weight_add_up_to_its_block_sums(data):
    size = st.integers(1, 4)
    height, width, rows, columns = (data.draw(size) for _ in range(4))
    grid = BlockGrid(height * rows, width * columns, height, width, transposed=data.draw(st.booleans()))
    weight = torch.arange(height * rows * width * columns).reshape(grid.stored_shape).float()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(weight)), max_size=3)))
    total = torch.zeros(grid.shape)
    for first, last in zip([0, *cuts], [*cuts, len(weight)], strict=True):
        add_block_sums(total, grid, weight[first:last], first, factor=2)
    assert torch.equal(total, 2 * grid.split(weight).sum((2, 3)))


@pytest.mark.parametrize("score", ["grad_l1", "grad_l2"])
def test_sums_in_bfloat16_take_half_the_memory_and_round_each_addition(score, llama):
    scorer, batches = scorer_for(llama, score, accumulator_dtype="bfloat16"), batches_of(llama)
    scores = observe(llama, scorer, batches)
    whole = scorer_for(llama, score)
    assert [2 * total.nbytes for total in scorer.statistics()] == [total.nbytes for total in whole.statistics()]
    each = [summed_gradients(llama, scorer.targets, [inputs]) for inputs in batches]
    for name, grid in scorer.grids.items():
        total = torch.zeros(grid.stored_shape, dtype=torch.bfloat16)
        for gradients in each:
            total = (total.float() + gradients[name]).bfloat16()
        assert torch.equal(scorer.sums[name], total)
        expected = block_scores(total.float(), grid, OF_SUMMED_GRADIENT[score])
        torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_magnitude_is_the_norm_of_each_block(make):
    scorer = scorer_for(make(), "magnitude", block_size=(32, 16))
    expected = {
        name: block_scores(linear.weight.detach(), scorer.grids[name], torch.linalg.matrix_norm)
        for name, linear in scorer.targets.items()
    }
    torch.testing.assert_close(scorer.scores(), expected, rtol=1e-6, atol=0)


def test_random_scores_follow_the_seed_alone(llama):
    first, again, other = (scorer_for(llama, "random", seed).scores() for seed in (1, 1, 2))
    for name, score in first.items():
        assert torch.equal(score, again[name])
        assert not torch.equal(score, other[name])
        assert (score > 0).all() and (score <= 1).all()


@pytest.mark.parametrize("score", SCORERS)
def test_scores_come_as_float32_on_the_cpu_in_the_models_order(score, llama):
    scores = observe(llama, scorer_for(llama, score))
    assert list(scores) == list(find_targets(llama, tiny.config()))
    assert {(tensor.dtype, tensor.device.type) for tensor in scores.values()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_no_hook_and_no_gradient_is_left_behind_after_an_exception(score, llama):
    scorer, (inputs,) = scorer_for(llama, score), batches_of(llama, 1)
    with pytest.raises(RuntimeError, match="in the middle"), frozen(llama), scorer.attached():
        scorer.begin_batch(inputs)
        loss = llama(**inputs).loss
        if scorer.needs_backward:
            loss.backward()
        raise RuntimeError("in the middle")
    for linear in scorer.targets.values():
        assert not linear._forward_hooks and not linear._forward_pre_hooks
        assert not linear.weight._post_accumulate_grad_hooks
        assert linear.weight.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("score", ["grad_l1", "grad_abs", "taylor"])
def test_one_gradient_is_alive_at_a_time(score, llama):
    alive = []
    scorer = scorer_for(llama, score)
    weights = [linear.weight for linear in scorer.targets.values()]
    with frozen(llama), scorer.attached():
        for weight in weights:
            weight.register_hook(lambda gradient: alive.append(sum(w.grad is not None for w in weights)))
        llama(**tiny.batch()).loss.backward()
    assert alive == [0] * len(weights)


@pytest.mark.parametrize("score", ["grad_signed", "qm_taylor", *INPUT_SCORES])
def test_no_weight_gradient_is_formed_by_autograd(score, llama):
    def refuse(gradient):
        raise AssertionError("a weight gradient was formed")

    handles = [parameter.register_hook(refuse) for parameter in llama.parameters()]
    observe(llama, scorer_for(llama, score))
    for handle in handles:
        handle.remove()


def test_a_gradient_from_before_the_warm_up_does_not_enter_the_scores(llama):
    expected = observe(llama, scorer_for(llama))
    llama(**tiny.batch()).loss.backward()
    torch.testing.assert_close(observe(llama, scorer_for(llama)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_observing_does_not_change_the_forward_pass(score, llama):
    expected = tiny.logits(llama)
    scorer = scorer_for(llama, score)
    with frozen(llama), scorer.attached():
        scorer.begin_batch({"labels": tiny.tokens(3)})
        assert torch.equal(tiny.logits(llama), expected)


class Scaled(nn.Module):
    """Reads the output of a linear, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.factor = nn.Linear(32, 32), factor

    def forward(self, x):
        return SimpleNamespace(loss=(self.factor * self.proj(x)).square().mean())


@pytest.mark.parametrize("score", ["grad_signed", "grad_abs", "grad_l1", "taylor"])
def test_a_hook_that_scales_an_output_counts_as_part_of_what_reads_it(score):
    by_hook, inside = Scaled(1.0), Scaled(20.0)
    by_hook.proj.register_forward_hook(lambda module, inputs, output: 20 * output)
    config, batches = tiny.config(target_modules=["proj"], score=score, budget=1), [{"x": torch.randn(8, 32)}]
    ours, expected = (BlockScores.of(model, config, batches).scores["proj"] for model in (by_hook, inside))
    torch.testing.assert_close(ours, expected)
