"""The study on a tiny model: one pass gives the scores of warm-ups of each length, and the report holds the results."""

import csv
import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.selection_study.__main__ import main
from recipes.selection_study.study import compare, run
from recipes.selection_study.warmup import SCORES, scores_along
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.scores.collect import collect_scores

STEPS = (1, 2, 4)


@pytest.fixture
def batches():
    return [tiny.batch(seed=seed) for seed in range(max(STEPS))]


def new_scorers(model):
    targets = find_targets(model, tiny.config())
    grids = target_grids(targets, tiny.config())
    return {score: make_scorer(targets, grids, tiny.config(score=score)) for score in SCORES}


def test_scores_along_one_warm_up_are_those_of_warm_ups_of_each_length(llama, batches):
    before = tiny.weights(llama)
    along = dict(scores_along(llama, new_scorers(llama), batches, STEPS))
    assert list(along) == list(STEPS)
    for steps, every in along.items():
        for score, scorer in new_scorers(llama).items():
            expected = collect_scores(llama, scorer, batches[:steps])
            assert list(every[score]) == list(expected)
            for name, values in expected.items():
                torch.testing.assert_close(every[score][name], values, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())


def test_each_selection_is_compared_with_the_longest_of_its_seed_and_with_that_of_the_other_seed(llama, batches):
    configs = {score: tiny.config(score=score) for score in SCORES}
    points = compare(run(llama, {0: batches, 1: batches[::-1]}, configs, STEPS))
    own = [point for point in points if point.against == "longest warm-up"]
    other = [point for point in points if point.against == "other seed"]
    assert [(point.score, point.seed, point.steps) for point in own] == [
        (score, seed, steps) for seed in "01" for steps in STEPS for score in SCORES
    ]
    assert [(point.score, point.seed, point.steps) for point in other] == [
        (score, "0 and 1", steps) for steps in STEPS for score in SCORES
    ]
    # After the last step, both orders have seen the same batches.
    for point in points:
        same = point.steps == max(STEPS)
        assert (point.jaccard == 1) >= same and (point.rank_correlation > 0.9999) >= same
    assert any(point.jaccard < 1 for point in own) and any(point.jaccard < 1 for point in other)


@pytest.fixture
def study(tmp_path):
    """Return a function that runs the command on a tiny model and data, and returns its output folder."""
    letters = {
        letter: number for number, letter in enumerate(["<unk>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])
    }
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    for split, count in (("train", 8), ("test", 1)):
        records = [
            {"instruction": f"{split} {chr(97 + number)}", "input": "", "output": answer, "answer": answer}
            for number, answer in zip(range(count), ["true", "false"] * count, strict=False)
        ]
        (folder / f"{split}.json").write_text(json.dumps(records))

    def study(*words: str):
        paths = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
        main([*paths, "--batch", "2", "--block-size", "16", "--budget", "0.03", *words])
        return tmp_path / "out"

    return study


def test_the_report_holds_numbers_tables_and_pictures(study, tmp_path):
    output = study("--steps", "1", "4")
    stems = [f"{stem}-{score}" for stem in ("selection", "layers", "shares", "scores") for score in SCORES]
    expected = {f"{stem}.{ending}" for stem in ["overlap", *stems] for ending in ("csv", "png")}
    assert {path.name for path in output.iterdir()} == expected | {"study.json", "study.md"}
    results = json.loads((output / "study.json").read_text())
    with open(output / "overlap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in point.items()} for point in results["points"]] == rows
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    assert results["model"] == "base" and results["seeds"] == [0, 1] and results["versions"]["torch"]
    report = (output / "study.md").read_text()
    assert all(f"({path})" in report for path in expected if path.endswith(".png"))
    assert str(tmp_path) not in report + (output / "study.json").read_text()


def test_more_steps_than_data_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match="Expected at least 10 training records for 5 steps of 2, got 8"):
        study("--steps", "5")
    assert not (tmp_path / "out").exists()
