"""The difference between two arms of a study, with an interval over questions and seeds.

Both arms answer the same Q questions after training with the same S seeds, so each question and seed gives one
difference d_sq. With its mean over the seeds d_q, and over the questions d_s,

    difference = mean(d_sq),    half width = 1.96 * sqrt(var(d_q) / Q + var(d_s) / S).

The second term counts what the first leaves out: that other seeds would have given another model. It needs two seeds.
"""

from collections.abc import Sequence
from statistics import mean, variance

from recipes.parts.evaluation import NORMAL_95


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return `second` minus `first` and the half width of its 95 % interval.

    Args:
        first, second: a row for each seed, with the value of each question.

    Raises:
        ValueError: the arms have different seeds or questions, or fewer than two questions.
    """
    if len(first) != len(second) or any(len(old) != len(new) for old, new in zip(first, second, strict=False)):
        raise ValueError(
            f"Expected the same seeds and questions in both arms, got {[len(row) for row in first]} and "
            f"{[len(row) for row in second]} questions. Compare arms of one study."
        )
    rows = [[new - old for old, new in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    by_question, by_seed = [mean(column) for column in zip(*rows, strict=True)], [mean(row) for row in rows]
    spread = variance(by_question) / len(by_question)
    if len(rows) > 1:
        spread += variance(by_seed) / len(rows)
    return mean(by_seed), NORMAL_95 * spread**0.5
