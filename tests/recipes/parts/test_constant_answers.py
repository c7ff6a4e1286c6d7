from recipes.parts.constant_answers import constant_answers
from recipes.parts.evaluation import Evaluation


def evaluation(**answers):
    return Evaluation({}, {}, answers)


def test_a_set_with_one_answer_to_all_questions_has_a_line():
    untuned = evaluation(likelihood={"boolq": ["true", "true"], "piqa": ["solution1", "solution2"]})
    tuned = evaluation(
        likelihood={"boolq": ["false", "false"], "piqa": ["solution1", "solution2"]},
        generated={"boolq": ["false", "false"], "piqa": ["solution2", "solution2"]},
    )
    assert constant_answers({"untuned": untuned, "tuned": tuned}) == [
        "boolq, untuned: every answer is true (likelihood)",
        "boolq, tuned: every answer is false (likelihood, generated)",
        "piqa, tuned: every answer is solution2 (generated)",
    ]


def test_texts_that_name_no_label_are_no_answer():
    assert constant_answers({"untuned": evaluation(generated={"boolq": [None, None], "piqa": [None, "x"]})}) == []


def test_a_task_without_labels_has_no_lines():
    assert constant_answers({"untuned": evaluation()}) == []
