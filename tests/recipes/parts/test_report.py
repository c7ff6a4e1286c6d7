import json
from types import SimpleNamespace

import pytest

from recipes.parts.baseline import Beside
from recipes.parts.evaluation import Evaluation
from recipes.parts.merged import Comparison
from recipes.parts.report import Run, write_report
from smt_trainer import BlockScores, SMTConfig
from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE
from smt_trainer.merging.logit_difference import LogitDifference

TASK = SimpleNamespace(name="riddles", measures={"accuracy": "share of riddles solved", "loss": "nats per token"})
LABELS = {"accuracy": {"old": ["yes", "no"], "new": ["yes", "yes", "yes"]}}


@pytest.fixture
def results(model, tmp_path):
    """What a run on a task with an accuracy and a loss leaves: the parsed JSON and the text."""
    for name in (DELTA_FILE, MANIFEST_FILE):
        (tmp_path / name).write_bytes(bytes(2**20))
    accuracies = {"old": [0.0, 1.0], "new": [0.0] * 3}, {"old": [1.0] * 2, "new": [1.0] * 3}
    losses = {"old": [2.0] * 2, "new": [1.0] * 3}, {"old": [1.0] * 2, "new": [0.5] * 3}
    before, after = (
        Evaluation({"accuracy": accuracy, "loss": loss}, {}, answers)
        for accuracy, loss, answers in zip(accuracies, losses, ({}, LABELS), strict=True)
    )
    run = Run(
        task=TASK,
        model="/somewhere/model",
        dtype="bfloat16",
        quantization=None,
        evaluated_on="test",
        before=before,
        after=after,
        merged=Comparison(None, False, LogitDifference(tokens=8, divergence=0.25, agreement=0.5, largest=2.0)),
        beside=Beside("LoRA", 0.01, 1234, Evaluation({"loss": losses[1]}, {})),
        selection=BlockScores.of(model, SMTConfig(score="random", budget=3, block_size=16), []).select(),
        steps=7,
        seconds_per_step=None,
        peak_memory_bytes=2**30,
        delta_folder=tmp_path,
        seed=1,
        total_seconds=90.0,
    )
    write_report(run, tmp_path)
    return json.loads((tmp_path / "results.json").read_text()), (tmp_path / "results.md").read_text()


def test_the_text_has_all_measures_of_the_task(results):
    _, text = results
    assert text.startswith(
        "# model on the riddles task\n\nMeasured on 5 test questions.\n\n- accuracy: share of riddles"
    )
    assert "| new | 3 | 0.0 | 100.0 | 1.000 | 0.500 | 0.500 |" in text
    assert "| **average** |  | **25.0** | **100.0** | **1.500** | **0.750** | **0.750** |" in text
    assert (
        "Against LoRA (1,234 parameters, rate 0.01, the same records and steps): +0.000 ± 0.000 nats of loss." in text
    )
    assert "Gain: +75.0 ± 49.0 points of accuracy, -0.750 ± 0.000 nats of loss (paired 95 % interval)." in text
    for row in ("weights | bfloat16", "steps | 7, none timed", "whole run | 1.5 min", "delta | 2.00 MiB"):
        assert f"| {row} |" in text
    assert "| merged checkpoint equal to the trained model | NO: over 8 tokens of a few prompts: KL 0.25 nats" in text
    assert "| quantised base |" not in text and "| merged onto |" not in text


def test_a_model_with_one_answer_is_named(results):
    assert "Warning: new, tuned: every answer is yes (accuracy).\n" in results[1]
    assert results[1].count("Warning") == 1


def test_the_json_holds_the_value_of_every_question(results):
    found, _ = results
    assert found["after"] == {
        "accuracy": {"old": [1.0] * 2, "new": [1.0] * 3},
        "loss": {"old": [1.0] * 2, "new": [0.5] * 3},
    }
    assert found["measures"]["loss"]["gain"] == -0.75
    assert found["model"] == "model"
