"""Detect models that give the same answer to every question of a set, which the training loss does not show."""

from collections.abc import Mapping

from recipes.parts.evaluation import Evaluation


def constant_answers(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return a line for each set whose answers are all alike, such as "boolq, tuned: every answer is true (accuracy)".

    Args:
        evaluations: label of a model ("untuned", "tuned") -> its evaluation.
    """
    measures: dict[tuple[str, str, str], list[str]] = {}
    for label, evaluation in evaluations.items():
        for measure, answers in evaluation.answers.items():
            for name, given in answers.items():
                if given[0] is not None and len(set(given)) == 1:
                    measures.setdefault((name, label, given[0]), []).append(measure)
    return [
        f"{name}, {label}: every answer is {answer} ({', '.join(found)})"
        for (name, label, answer), found in measures.items()
    ]
