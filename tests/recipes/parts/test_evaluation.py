import math

import pytest

from recipes.parts.evaluation import Evaluation, paired_gain


def test_average_weighs_sets_not_questions():
    accuracy = {"boolq": [1.0, 0.0, 0.0, 0.0], "piqa": [1.0]}
    result = Evaluation({"accuracy": accuracy, "loss": {"boolq": [0.5] * 4, "piqa": [1.5]}}, texts={})
    assert result.means("accuracy") == {"boolq": 0.25, "piqa": 1.0}
    assert result.average("accuracy") == 0.625
    assert result.average("loss") == 1.0


def test_consecutive_shares_join_in_their_order():
    shares = [
        Evaluation({"accuracy": {"piqa": [1.0, 0.0]}}, {"piqa": ["a", "b"]}, {"accuracy": {"piqa": ["A", None]}}),
        Evaluation({"accuracy": {"piqa": [1.0]}}, {"piqa": ["c"]}, {"accuracy": {"piqa": ["C"]}}),
    ]
    assert Evaluation.joined(shares) == Evaluation(
        {"accuracy": {"piqa": [1.0, 0.0, 1.0]}},
        {"piqa": ["a", "b", "c"]},
        {"accuracy": {"piqa": ["A", None, "C"]}},
    )


def test_paired_gain_against_a_computation_by_hand():
    before = {"boolq": [0.0, 0.0, 1.0, 1.0], "piqa": [0.0, 1.0]}
    after = {"boolq": [1.0, 0.0, 1.0, 1.0], "piqa": [1.0, 0.0]}
    # boolq: d = 1, 0, 0, 0: mean 1/4, variance 1/4. piqa: d = 1, -1: mean 0, variance 2.
    gain, half_width = paired_gain(before, after)
    assert gain == pytest.approx(1 / 8)
    assert half_width == pytest.approx(1.96 / 2 * math.sqrt(0.25 / 4 + 2 / 2))


def test_paired_gain_refuses_runs_on_different_questions():
    with pytest.raises(ValueError, match="Expected the same question sets and questions"):
        paired_gain({"piqa": [1.0, 0.0]}, {"piqa": [1.0, 0.0, 1.0]})
    with pytest.raises(ValueError, match="at least two of each set"):
        paired_gain({"piqa": [1.0]}, {"piqa": [0.0]})
