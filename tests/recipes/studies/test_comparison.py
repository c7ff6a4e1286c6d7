import random
from statistics import mean

import pytest

from recipes.parts.evaluation import paired_gain
from recipes.studies.parts.comparison import difference


def test_one_seed_gives_the_paired_interval_of_an_evaluation():
    rng = random.Random(0)
    first, second = ([rng.random() for _ in range(20)] for _ in range(2))
    assert difference([first], [second]) == pytest.approx(paired_gain({"set": first}, {"set": second}))


def test_seeds_that_disagree_widen_the_interval():
    questions = [[0.0, 1.0] * 10] * 2
    agreeing = difference(questions, [[value + 1 for value in row] for row in questions])
    disagreeing = difference(questions, [questions[0], [value + 2 for value in questions[1]]])
    assert agreeing[0] == disagreeing[0] == 1
    assert agreeing[1] == 0
    assert disagreeing[1] == pytest.approx(1.96 * (2 / 2) ** 0.5)


def test_the_interval_holds_the_truth_in_about_95_of_100_cases():
    rng = random.Random(1)
    held = []
    for _ in range(400):
        seeds = [rng.gauss(0, 0.2) for _ in range(10)]
        noise = [rng.gauss(0, 1) for _ in range(50)]
        rows = [[seed + question for question in noise] for seed in seeds]
        value, half_width = difference([[0.0] * 50] * 10, rows)
        held.append(abs(value) <= half_width)
    assert 0.90 < mean(held) <= 0.98


def test_other_seeds_or_questions_are_refused():
    with pytest.raises(ValueError, match="same seeds and questions"):
        difference([[0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="same seeds and questions"):
        difference([[0.0, 1.0]], [[0.0, 1.0, 1.0]])
