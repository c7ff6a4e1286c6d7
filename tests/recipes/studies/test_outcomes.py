import random
from statistics import mean

import pytest
from datasets import Dataset

from recipes.studies.parts.comparison import difference
from recipes.studies.parts.outcomes import Outcomes
from recipes.studies.parts.run import TEMPLATE, choose_questions
from recipes.studies.parts.study import Arm

FIRST, SECOND = Arm("first", "smt", 0.0084), Arm("second", "lora", 0.0084)
LOSS = "loss", "new numbers"


def result(seed: int, values: list[float], templates: list[int] | None) -> dict:
    found = {"run": {"seed": seed}, "values": {"loss": {"new numbers": values}}}
    return found | ({"templates": {"new numbers": templates}} if templates else {})


def test_a_template_counts_once_however_many_questions_it_has():
    outcomes = Outcomes({FIRST: [result(1, [1.0, 1.0, 1.0, 5.0], [7, 7, 7, 8])]})
    assert outcomes.by_template(FIRST, *LOSS) == [[1.0, 5.0]]
    assert outcomes.means(FIRST, *LOSS) == [3.0]


def test_a_question_without_a_template_counts_by_itself():
    outcomes = Outcomes({FIRST: [result(1, [1.0, 1.0, 1.0, 5.0], None)]})
    assert outcomes.means(FIRST, *LOSS) == [2.0]


def test_only_questions_that_all_arms_answered_count():
    wide = result(1, [1.0, 2.0, 9.0], [7, 8, 9])
    outcomes = Outcomes({FIRST: [wide, result(2, [3.0, 4.0, 9.0], [7, 8, 9])], SECOND: [result(1, [2.0, 4.0], [7, 8])]})
    assert outcomes.templates[LOSS] == [7, 8]
    assert outcomes.means(FIRST, *LOSS) == [1.5, 3.5]


def test_runs_that_answered_other_questions_are_refused():
    with pytest.raises(ValueError, match="the same questions in all runs"):
        Outcomes({FIRST: [result(1, [1.0, 2.0], [7, 8])], SECOND: [result(1, [1.0, 2.0], [8, 7])]})


def test_arms_are_paired_by_seed_whatever_their_order():
    rows = {1: [1.0, 2.0, 4.0], 2: [2.0, 2.0, 3.0], 3: [9.0, 9.0, 9.0]}
    first = [result(seed, rows[seed], [7, 8, 9]) for seed in (1, 2, 3)]
    second = [result(seed, [value + seed for value in rows[seed]], [7, 8, 9]) for seed in (2, 1)]
    found = Outcomes({FIRST: first, SECOND: second}).difference(FIRST, SECOND, *LOSS)
    assert found == difference([rows[1], rows[2]], [[2.0, 3.0, 5.0], [4.0, 4.0, 5.0]])


def test_one_seed_has_no_interval_and_none_in_common_no_difference():
    each = [result(seed, [1.0, 2.0], [7, 8]) for seed in (1, 2)]
    assert Outcomes({FIRST: each, SECOND: each[:1]}).difference(FIRST, SECOND, *LOSS) == (0.0, None)
    with pytest.raises(ValueError, match="seeds in common"):
        Outcomes({FIRST: each[:1], SECOND: each[1:]}).difference(FIRST, SECOND, *LOSS)


def test_the_interval_holds_the_truth_where_the_questions_of_a_template_are_alike():
    rng = random.Random(2)
    templates = [template for template in range(10) for _ in range(10)]
    held, naive = [], []
    for _ in range(300):
        shift, seeds = [rng.gauss(0, 1) for _ in range(10)], [rng.gauss(0, 0.3) for _ in range(3)]
        rows = [[seed + shift[template] + rng.gauss(0, 0.3) for template in templates] for seed in seeds]
        zeros = [[0.0] * 100 for _ in seeds]
        pair = ([result(seed, row, templates) for seed, row in enumerate(each)] for each in (zeros, rows))
        value, half_width = Outcomes(dict(zip((FIRST, SECOND), pair, strict=True))).difference(FIRST, SECOND, *LOSS)
        held.append(abs(value) <= half_width)
        value, half_width = difference(zeros, rows)
        naive.append(abs(value) <= half_width)
    assert mean(naive) < 0.85 < 0.92 < mean(held) <= 0.99


def test_the_test_begins_with_the_same_questions_and_reaches_all_templates():
    questions = Dataset.from_dict({"instruction": list("abcdefghij"), TEMPLATE: list("1111122234")})
    assert choose_questions(questions, 4)["instruction"] == list("abcdfgij")
    assert choose_questions(questions.remove_columns(TEMPLATE), 4)["instruction"] == list("abcd")
    assert len(choose_questions(questions, 100)) == 10
