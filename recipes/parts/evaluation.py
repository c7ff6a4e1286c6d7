"""The result of measuring a model question by question, and the gain between two results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, variance

NORMAL_95 = 1.96

# Question set -> one value for each question, in the order of its questions.
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation, in the order of each set's questions.

    Attributes:
        values: measure -> question set -> its value on each question (1 or 0 for an accuracy).
        texts: question set -> generated texts; empty if nothing was generated.
        answers: measure -> question set -> the label that the model named, or None; only for measures of questions
            that offer labels.
    """

    values: dict[str, Values]
    texts: dict[str, list[str]]
    answers: dict[str, dict[str, list[str | None]]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Join `parts`, each the evaluation of a consecutive share of every set's questions."""
        first = parts[0]
        return cls(
            {measure: _joined([part.values[measure] for part in parts]) for measure in first.values},
            _joined([part.texts for part in parts]),
            {measure: _joined([part.answers[measure] for part in parts]) for measure in first.answers},
        )

    def means(self, measure: str) -> dict[str, float]:
        """Return question set -> mean of `measure` over its questions."""
        return {name: mean(values) for name, values in self.values[measure].items()}

    def average(self, measure: str) -> float:
        """Return the unweighted mean of the sets' means."""
        return mean(self.means(measure).values())


def _joined(parts: Sequence[Mapping[str, list]]) -> dict[str, list]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def paired_gain(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return the gain of the unweighted average of the sets and the half width of its 95 % interval.

    Both runs answer the same questions, so each question gives one difference d. For K sets with n_k questions each,

        gain = mean_k mean(d_k),    half width = 1.96 / K * sqrt(sum_k var(d_k) / n_k).

    Args:
        before: question set -> value of each question, as in `Evaluation.values`.
        after: the same after training.

    Raises:
        ValueError: the runs have different sets or numbers of questions, or a set has fewer than two questions.
    """
    sizes, sizes_after = ({name: len(values) for name, values in run.items()} for run in (before, after))
    if sizes != sizes_after or min(sizes.values(), default=0) < 2:
        raise ValueError(
            "Expected the same question sets and questions before and after, at least two of each set; "
            f"got {sizes} and {sizes_after}. Evaluate both models on the same questions."
        )
    differences = [[new - old for old, new in zip(before[name], after[name], strict=True)] for name in before]
    gain = mean(map(mean, differences))
    spread = sum(variance(difference) / len(difference) for difference in differences)
    return gain, NORMAL_95 * spread**0.5 / len(differences)
