import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from recipes.commonsense.task import COMMONSENSE
from recipes.parts.cached_evaluation import Subject, keep, kept
from recipes.parts.evaluation import Evaluation
from recipes.parts.task import Decoding

EVALUATION = Evaluation(
    {"accuracy": {"piqa": [1.0, 0.0]}}, {"piqa": ["a", 'b "quoted"\n']}, {"accuracy": {"piqa": ["a", None]}}
)


def questions(*instructions):
    record = {"input": "", "output": "it is a", "answer": "a"}
    return {"piqa": Dataset.from_list([{"instruction": text, **record} for text in instructions])}


@pytest.fixture
def subject(model):
    return Subject.of(COMMONSENSE, model, questions("one", "two"), Decoding())


def test_what_is_kept_is_read_again(subject, tmp_path):
    keep(EVALUATION, subject, tmp_path)
    assert kept(subject, tmp_path) == EVALUATION


def test_without_a_file_nothing_is_kept(subject, tmp_path):
    assert kept(subject, tmp_path) is None


@pytest.mark.parametrize("changed", ["model", "questions", "order", "decoding"])
def test_an_evaluation_of_something_else_is_not_taken(changed, subject, model, tmp_path, caplog):
    keep(EVALUATION, subject, tmp_path)
    asked, decoding = questions("one", "two"), Decoding()
    if changed == "model":
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    elif changed == "decoding":
        decoding = Decoding(num_beams=2)
    else:
        asked = questions("two", "one") if changed == "order" else questions("one", "three")
    with caplog.at_level(logging.INFO):
        assert kept(Subject.of(COMMONSENSE, model, asked, decoding), tmp_path) is None
    assert "before.json is from another run" in caplog.text


def test_how_many_questions_are_answered_at_once_does_not_matter(subject, model):
    assert Subject.of(COMMONSENSE, model, questions("one", "two"), Decoding(batch_tokens=5)) == subject


def test_a_file_of_another_form_is_not_taken(subject, tmp_path):
    (tmp_path / "before.json").write_text('{"average": 0.5}')
    assert kept(subject, tmp_path) is None
    assert kept(replace(subject, task="math"), tmp_path) is None
