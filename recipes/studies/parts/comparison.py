"""The difference between two arms of a study, with an interval over questions and seeds.

Both arms answer the same Q questions after training with the same S seeds, so each question and seed gives one
difference d_sq. Questions must be independent: of those made from one template, take the mean as one question. With the
means of d_sq over the seeds d_q, and over the questions d_s,

    difference = mean(d_sq),    half width = t * sqrt(a + b),    a = var(d_q) / Q,    b = var(d_s) / S.

b accounts for what a leaves out: other seeds would have given another model. It needs two seeds. Few seeds estimate
their own variance poorly, so t is the 97.5 % quantile of Student's distribution, with Welch and Satterthwaite's degrees
of freedom for a sum of two variances, (a + b)^2 / (a^2 / (Q - 1) + b^2 / (S - 1)): 4.3 where three seeds decide,
1.96 where many questions do.
"""

from collections.abc import Sequence
from statistics import mean, variance

from scipy.stats import t


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
    parts = [(variance(each) / len(each), len(each) - 1) for each in (by_question, by_seed) if len(each) > 1]
    spread = sum(part for part, _ in parts)
    if spread == 0:
        return mean(by_seed), 0.0
    freedom = spread**2 / sum(part**2 / degrees for part, degrees in parts)
    return mean(by_seed), float(t.ppf(0.975, freedom)) * spread**0.5
