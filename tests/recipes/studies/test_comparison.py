import random
from statistics import mean

import pytest
from scipy.stats import ttest_rel

from recipes.parts.evaluation import paired_gain
from recipes.studies.parts.comparison import difference


def test_one_seed_and_many_questions_give_the_paired_interval_of_an_evaluation():
    rng = random.Random(0)
    first, second = ([rng.random() for _ in range(20_000)] for _ in range(2))
    assert difference([first], [second]) == pytest.approx(paired_gain({"set": first}, {"set": second}), rel=1e-4)


def test_one_seed_gives_the_interval_of_a_paired_t_test():
    rng = random.Random(0)
    first, second = ([rng.random() for _ in range(12)] for _ in range(2))
    value, half_width = difference([first], [second])
    interval = ttest_rel(second, first).confidence_interval(0.95)
    assert (value - half_width, value + half_width) == pytest.approx((interval.low, interval.high))


def test_seeds_that_disagree_widen_the_interval():
    questions = [[0.0, 1.0] * 10] * 2
    agreeing = difference(questions, [[value + 1 for value in row] for row in questions])
    disagreeing = difference(questions, [questions[0], [value + 2 for value in questions[1]]])
    assert agreeing[0] == disagreeing[0] == 1
    assert agreeing[1] == 0
    assert disagreeing[1] == pytest.approx(12.706 * (2 / 2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("number", "spread"), [(3, 1.0), (3, 0.2), (10, 0.2)])
def test_the_interval_holds_the_truth_in_about_95_of_100_cases(number: int, spread: float):
    rng = random.Random(1)
    held = []
    for _ in range(400):
        seeds = [rng.gauss(0, spread) for _ in range(number)]
        noise = [rng.gauss(0, 1) for _ in range(50)]
        rows = [[seed + question for question in noise] for seed in seeds]
        value, half_width = difference([[0.0] * 50] * number, rows)
        held.append(abs(value) <= half_width)
    assert 0.90 < mean(held) <= 0.98


def test_other_seeds_or_questions_are_refused():
    with pytest.raises(ValueError, match="same seeds and questions"):
        difference([[0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="same seeds and questions"):
        difference([[0.0, 1.0]], [[0.0, 1.0, 1.0]])
