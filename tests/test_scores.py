"""Scorers against scores computed from full weight gradients, block by block."""

import contextlib

import pytest
import tiny
import torch
from reference import block_scores, summed_gradients
from test_convert import inputs_of

from smt_trainer.scores import make_scorer
from smt_trainer.targets import find_targets, target_grids
from smt_trainer.warmup import frozen

TWINS = {
    "grad_l1": lambda block: block.abs().mean(),
    "grad_signed": lambda block: block.mean().abs(),
    "magnitude": lambda block: block.square().sum().sqrt(),
}
BATCHES = [tiny.batch(2, seed=seed) for seed in (3, 4)]
NO_CONTEXT = contextlib.nullcontext()
CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}


def scorer_for(model, score="grad_l1", seed=0, **fields):
    smt_config = tiny.config(score=score, **fields)
    targets = find_targets(model, smt_config)
    return make_scorer(targets, target_grids(targets, smt_config), smt_config, seed)


def observe(model, scorer, batches=BATCHES, context=NO_CONTEXT):
    batches = batches if scorer.needs_warmup else []
    with frozen(model), scorer.attached():
        for inputs in batches:
            with context:
                loss = model(**inputs).loss
            loss.backward()
    return scorer.scores()


def twin_scores(model, scorer, score, batches=BATCHES):
    gradients = summed_gradients(model, scorer.targets, batches)
    return {name: block_scores(gradients[name], scorer.grids[name], TWINS[score]) for name in gradients}


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.albert])
@pytest.mark.parametrize("score", ["grad_l1", "grad_signed"])
@pytest.mark.parametrize("fields", [{}, {"granularity": "row", "block_size": "auto"}, {"block_size": (32, 16)}])
# Both scorers sum in float32, whatever the model's dtype.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_gradient_scores_equal_their_definition_on_full_gradients(make, score, fields, dtype, rtol):
    model = make().to(dtype)
    batches = [inputs_of(model), inputs_of(model)]
    scorer = scorer_for(model, score, **fields)
    expected = twin_scores(model, scorer, score, batches)
    torch.testing.assert_close(
        observe(model, scorer, batches), {name: twin.float() for name, twin in expected.items()}, rtol=rtol, atol=1e-8
    )


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("score", ["grad_l1", "grad_signed"])
def test_gradient_checkpointing_does_not_change_scores(score, reentrant):
    plain, model = tiny.llama(), tiny.llama().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, scores = (observe(each, scorer_for(each, score)) for each in (plain, model))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", ["grad_l1", "grad_signed"])
def test_scores_under_bfloat16_autocast_stay_within_bfloat16_of_float32(score, llama):
    expected = observe(llama, scorer_for(llama, score))
    scores = observe(llama, scorer_for(llama, score), context=torch.autocast("cpu", torch.bfloat16))
    largest = max(score.max() for score in expected.values()).item()
    # Eight bits of mantissa, through two layers forward and backward.
    torch.testing.assert_close(scores, expected, rtol=0, atol=largest * 2**-5)


@pytest.mark.parametrize("score", ["grad_l1", "grad_signed"])
def test_a_batch_scores_like_its_halves_weighted_by_their_tokens(score):
    model = tiny.llama().double()
    whole, rows = scorer_for(model, score), tiny.tokens(4)
    predicted = 4 * (tiny.LENGTH - 1)
    halves = [{"input_ids": half, "labels": half, "num_items_in_batch": predicted} for half in rows.split(2)]
    cut = scorer_for(model, score)
    torch.testing.assert_close(
        observe(model, cut, halves), observe(model, whole, [{"input_ids": rows, "labels": rows}]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_magnitude_is_the_norm_of_each_block(make):
    scorer = scorer_for(make(), "magnitude", block_size=(32, 16))
    expected = {
        name: block_scores(linear.weight.detach(), scorer.grids[name], TWINS["magnitude"])
        for name, linear in scorer.targets.items()
    }
    torch.testing.assert_close(scorer.scores(), expected, rtol=1e-6, atol=0)


def test_random_scores_follow_the_seed_alone(llama):
    first, again, other = (scorer_for(llama, "random", seed).scores() for seed in (1, 1, 2))
    for name, score in first.items():
        assert torch.equal(score, again[name])
        assert not torch.equal(score, other[name])
        assert (score > 0).all() and (score <= 1).all()


@pytest.mark.parametrize("score", TWINS)
def test_scores_come_as_float32_on_the_cpu_in_the_models_order(score, llama):
    scores = observe(llama, scorer_for(llama, score))
    assert list(scores) == list(find_targets(llama, tiny.config()))
    assert {(tensor.dtype, tensor.device.type) for tensor in scores.values()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("score", ["grad_l1", "grad_signed"])
def test_no_hook_and_no_gradient_is_left_behind_after_an_exception(score, llama):
    scorer = scorer_for(llama, score)
    with pytest.raises(RuntimeError, match="in the middle"), frozen(llama), scorer.attached():
        llama(**BATCHES[0]).loss.backward()
        raise RuntimeError("in the middle")
    for linear in scorer.targets.values():
        assert not linear._forward_hooks and not linear.weight._post_accumulate_grad_hooks
        assert linear.weight.grad is None


def test_grad_l1_keeps_one_gradient_alive_at_a_time(llama):
    alive = []
    scorer = scorer_for(llama)
    weights = [linear.weight for linear in scorer.targets.values()]
    with frozen(llama), scorer.attached():
        for weight in weights:
            weight.register_hook(lambda gradient: alive.append(sum(w.grad is not None for w in weights)))
        llama(**BATCHES[0]).loss.backward()
    assert alive == [0] * len(weights)


def test_a_gradient_from_before_the_warm_up_does_not_enter_the_scores(llama):
    expected = observe(llama, scorer_for(llama))
    llama(**BATCHES[0]).loss.backward()
    torch.testing.assert_close(observe(llama, scorer_for(llama)), expected, rtol=0, atol=0)


def test_observing_does_not_change_the_forward_pass(llama):
    expected = tiny.logits(llama)
    with frozen(llama), scorer_for(llama, "grad_signed").attached():
        assert torch.equal(tiny.logits(llama), expected)
