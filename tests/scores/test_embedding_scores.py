"""The scores of the rows of embeddings, tied or not."""

import copy

import pytest
import tiny
import torch

from smt_trainer import BlockScores, SMTConfig, SMTError
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.scores.collect import collect_scores
from smt_trainer.scores.preserved import frozen

NAME = "model.embed_tokens"
OF_BLOCK = {
    "grad_l1": lambda g, w: g.abs().mean((2, 3)),
    "grad_l2": lambda g, w: g.square().sum((2, 3)).sqrt(),
    "grad_signed": lambda g, w: g.mean((2, 3)).abs(),
    "grad_abs": lambda g, w: g.abs().mean((2, 3)),
    "taylor": lambda g, w: (g * w).sum((2, 3)).abs(),
    "magnitude": lambda g, w: w.square().sum((2, 3)).sqrt(),
}
SHAPES = {"rows": {"granularity": "row"}, "blocks": {"block_size": (4, 16)}}


def config(score, **fields) -> SMTConfig:
    return SMTConfig(**{"target_modules": ["embed_tokens", "q_proj"], "score": score, "budget": 8} | fields)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return tiny.llama(tie_word_embeddings=request.param)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("score", OF_BLOCK)
def test_scores_are_those_of_the_dense_gradient(model, score, fields):
    asked, before = config(score, **fields), tiny.weights(model)
    dense = copy.deepcopy(model)
    dense(**tiny.batch()).loss.backward()
    targets = find_targets(model, asked)
    scorer = make_scorer(targets, target_grids(targets, asked), asked)
    found = collect_scores(model, scorer, [tiny.batch()])
    assert list(found) == [NAME, "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for name, scores in found.items():
        weight, grid = dense.get_submodule(name).weight, scorer.grids[name]
        wanted = OF_BLOCK[score](grid.split(weight.grad), grid.split(weight.detach()))
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-6)
    tiny.assert_same(tiny.weights(model), before)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_score_of_the_inputs_counts_tokens(model, fields):
    asked, ids = config("activation", **fields), tiny.tokens(4)
    ids[0, :3] = 0
    scores = BlockScores.of(model, asked, [{"input_ids": ids, "labels": ids}]).scores[NAME]
    counts = torch.tensor([float((ids == token).sum()) * (token != 0) for token in range(tiny.VOCABULARY)])
    block_rows = tiny.VOCABULARY // scores.shape[0]
    wanted = counts.view(-1, block_rows).sum(1, keepdim=True).sqrt().expand(scores.shape)
    torch.testing.assert_close(scores, wanted)


def test_scores_by_class_refuse_embeddings(model):
    asked = config("qm_taylor", granularity="row")
    targets = find_targets(model, asked)
    scorer, inputs = make_scorer(targets, target_grids(targets, asked), asked), tiny.batch()
    with frozen(model), scorer.attached(), pytest.raises(SMTError, match=r"a head tied to `model.embed_tokens`"):
        scorer.begin_batch(inputs)
        model(**inputs)
