import pytest
import torch
from datasets import Dataset

from recipes.math.task import ACCURACY, LOSS, MATH, TOKENS
from recipes.parts.task import Decoding

SOLUTIONS = {"1 + 1?": ("2", "So 2.\n#### 2"), "2 + 3?": ("5", "So 5.\n#### 5")}


@pytest.fixture
def questions():
    records = [{"instruction": q, "input": "", "output": o, "answer": a} for q, (a, o) in SOLUTIONS.items()]
    return {"new numbers": Dataset.from_list(records), "AddSub": Dataset.from_list(records[:1])}


def test_a_source_is_read_from_files_and_none_is_drawn(monkeypatch):
    monkeypatch.setattr("recipes.math.task.file_splits", lambda *arguments: arguments)
    monkeypatch.setattr("recipes.math.task.symbolic_splits", lambda *arguments: arguments)
    assert MATH.load("folder", 3, 1) == ("folder", 3, 1)
    assert MATH.load(None, 3, 1) == (3, 1)


def evaluate(model, tokenizer, questions, **decoding):
    return MATH.evaluate(model, tokenizer, questions, Decoding(max_new_tokens=4, **decoding))


def test_every_question_has_a_loss_an_accuracy_and_a_text(model, tokenizer, questions):
    result = evaluate(model, tokenizer, questions)
    sizes = {"new numbers": 2, "AddSub": 1}
    assert list(result.values) == list(MATH.measures) == [ACCURACY, TOKENS, LOSS]
    for found in (*result.values.values(), result.texts):
        assert {name: len(values) for name, values in found.items()} == sizes
    assert result.average(LOSS) > 0


def test_without_generation_only_the_solutions_are_measured(model, tokenizer, questions):
    result = evaluate(model, tokenizer, questions, generate=False)
    assert list(result.values) == [TOKENS, LOSS]
    assert result.texts == {}
    assert result.values[LOSS] == evaluate(model, tokenizer, questions).values[LOSS]


def test_only_gsm_symbolic_asks_for_the_mark(model, tokenizer, questions, monkeypatch):
    monkeypatch.setattr("recipes.math.task.generate_texts", lambda model, tokenizer, asked, *_: ["2"] * len(asked))
    assert evaluate(model, tokenizer, questions).values[ACCURACY] == {"new numbers": [0.0, 0.0], "AddSub": [1.0]}
    monkeypatch.setattr("recipes.math.task.generate_texts", lambda model, tokenizer, asked, *_: ["#### 2"] * len(asked))
    assert evaluate(model, tokenizer, questions).values[ACCURACY] == {"new numbers": [1.0, 0.0], "AddSub": [1.0]}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(model, tokenizer, questions, training):
    model.train(training)
    evaluate(model, tokenizer, questions)
    assert model.training == training
    assert torch.is_grad_enabled()
