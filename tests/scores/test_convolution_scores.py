"""Scores of convolutions' blocks equal their definition on the full gradient, or on the unfolded input."""

import images
import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import block_scores, examples_of_class, quantile_mean, summed_gradients, taylor
from torch import nn

from smt_trainer.model.convolution import squared_inputs
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import SCORERS, make_scorer
from smt_trainer.scores.collect import collect_scores

ROWS = {"rows": {}, "columns": {"granularity": "column"}}
OF_GRADIENT = {
    "grad_l1": lambda block: block.abs().mean(),
    "grad_l2": lambda block: block.square().sum().sqrt(),
    "grad_signed": lambda block: block.mean().abs(),
}


def scorer_for(model, score, **fields):
    config = images.config(score=score, **fields)
    targets = find_targets(model, config)
    return make_scorer(targets, target_grids(targets, config), config)


def matrix(weight):
    return weight.detach().flatten(1)


def pieces(tensor, grid, score):
    """Return the `score` of every block [R, C] of a weight [O, I/g, *kernel], one at a time."""
    flat = tensor.detach().flatten(1)
    return block_scores(flat, grid, score)


@pytest.fixture(params=[images.resnet, images.ResNeXt])
def model(request):
    return request.param().double().eval()


@pytest.mark.parametrize("fields", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("score", [*OF_GRADIENT, "grad_abs", "taylor", "qm_taylor", "magnitude"])
def test_scores_equal_their_definition(model, score, fields):
    scorer = scorer_for(model, score, **fields)
    batches = [images.batch(6, seed) for seed in (1, 2)]
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].double()
    scores = collect_scores(model, scorer, [dict(batch) for batch in batches])
    weights = {name: layer.weight for name, layer in scorer.targets.items()}
    grids, names = scorer.grids, list(scorer.grids)
    if score == "magnitude":
        expected = {name: pieces(weights[name], grids[name], lambda block: block.norm()) for name in names}
    elif score in OF_GRADIENT:
        gradients = summed_gradients(model, names, batches)
        expected = {name: pieces(gradients[name], grids[name], OF_GRADIENT[score]) for name in names}
    elif score == "grad_abs":
        each = [summed_gradients(model, names, [batch]) for batch in batches]
        expected = {name: sum(pieces(g[name].abs(), grids[name], torch.mean) for g in each) for name in names}
    elif score == "taylor":
        gradients = summed_gradients(model, names, batches)
        expected = {name: taylor(matrix(weights[name]), matrix(gradients[name]), grids[name]) for name in names}
    else:
        by_class = []
        for label in range(images.LABELS):
            parts = [examples_of_class(batch, batch["labels"], label)[0] for batch in batches]
            gradients = summed_gradients(model, names, parts)
            by_class.append(
                {name: taylor(matrix(weights[name]), matrix(gradients[name]), grids[name]) for name in names}
            )
        expected = {name: quantile_mean([scores[name] for scores in by_class]) for name in names}
    for name in names:
        tolerance = 1e-5 * expected[name].max().item()
        torch.testing.assert_close(scores[name], expected[name].float(), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_activation_sums_what_each_weight_multiplies(groups, mode):
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, padding_mode=mode)
    x = torch.randn(3, 4, 6, 7)
    edges = F.pad(x, [1] * 4, "constant" if mode == "zeros" else mode)
    unfolded = F.unfold(edges, 3, stride=2).square().sum((0, 2)).view(groups, -1)
    torch.testing.assert_close(squared_inputs(conv, x), unfolded)
    for fields in ({}, {"granularity": "column"}, {"granularity": "block", "block_size": (4, 3)}):
        model = nn.ModuleDict({"conv": conv})
        scorer = scorer_for(model, "activation", **fields)
        with scorer.attached():
            conv(x)
        of_rows = unfolded.repeat_interleave(8 // groups, 0)
        (br, _), grid = scorer.grids["conv"].block_shape, scorer.grids["conv"]
        expected = block_scores(of_rows, grid, lambda block, br=br: (block.sum() / br).sqrt())
        torch.testing.assert_close(scorer.scores()["conv"], expected)


@pytest.mark.parametrize("score", SCORERS)
def test_a_warm_up_leaves_weights_and_running_statistics_as_they_were(score):
    model = images.ResNeXt().train()
    before = tiny.weights(model)
    collect_scores(model, scorer_for(model, score), [images.batch(6)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("score", ["taylor", "qm_taylor"])
def test_taylor_scores_use_running_statistics_also_in_training(score):
    """Under those of its batch, batch normalisation would leave nothing of a row's score but rounding."""
    model, batches = images.ResNeXt(), [images.batch(6)]
    expected = collect_scores(model.eval(), scorer_for(model, score), [dict(batch) for batch in batches])
    model.train()
    model.blocks[0].bn1.eval()
    tiny.assert_same(collect_scores(model, scorer_for(model, score), [dict(batch) for batch in batches]), expected)
    assert not model.blocks[0].bn1.training and model.blocks[1].bn1.training
    assert not model.blocks[0].bn1._forward_pre_hooks
