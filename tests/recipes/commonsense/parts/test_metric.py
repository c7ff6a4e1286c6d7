import pytest

from recipes.commonsense.parts.metric import ChoiceAccuracy
from recipes.commonsense.parts.question_sets import QUESTION_SETS


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolq", "the correct answer is True", "true"),
        ("boolq", "False, not true", "false"),
        ("piqa", "Solution2 beats solution1", "solution2"),
        ("social_i_qa", "answer9 or answer3?", "answer3"),
        ("hellaswag", "ending4", "ending4"),
        ("winogrande", "OPTION1", "option1"),
        ("ARC-Easy", "the answer is 3", None),
        ("openbookqa", "", None),
    ],
)
def test_the_first_answer_of_the_set_counts(name, text, answer):
    assert ChoiceAccuracy(name).extract(text) == answer


def test_accuracy_is_the_mean_of_the_correct_answers():
    metric = ChoiceAccuracy("boolq")
    texts, gold = ["true", "no idea", "true or false", "false"], ["true", "true", "False", "FALSE"]
    assert metric.correct(texts, gold) == [True, False, False, True]
    assert metric.compute(predictions=texts, references=gold) == {"accuracy": 0.5}


def test_it_leaves_no_file_behind(tmp_path):
    ChoiceAccuracy("piqa").compute(predictions=["solution1"], references=["solution1"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the metric opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ChoiceAccuracy("piqa").compute(predictions=["solution1"], references=["solution1"])


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=f"Expected a question set among {', '.join(QUESTION_SETS)}; got 'squad'"):
        ChoiceAccuracy("squad")
