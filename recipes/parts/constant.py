"""Models that give one answer to every question of a set; the loss of training does not show them."""

from collections.abc import Mapping

from recipes.parts.evaluation import Evaluation


def constant_answers(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return a line for each set whose answers are all alike, such as "boolq, tuned: every answer is true (accuracy)".

    Args:
        evaluations: what the model is called ("untuned", "tuned") -> its evaluation.
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
