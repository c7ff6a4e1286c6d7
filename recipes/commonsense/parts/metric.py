"""Accuracy of generated answers, as LLM-Adapters scores them."""

import re
from collections.abc import Sequence

import datasets
import evaluate

from recipes.commonsense.parts.tasks import TASKS

_DESCRIPTION = """BudgetGroup of generations whose first named answer is the gold one.

Text and answer are lower-cased; the first answer label of the task found anywhere in the text counts, and a text
that names none is wrong.
"""


class ChoiceAccuracy(evaluate.Metric):
    """Accuracy on one commonsense task; `config_name` is the name of the task.

    `compute(predictions=texts, references=answers)` returns {"accuracy": share in [0, 1]}.
    """

    def __init__(self, config_name: str):
        if config_name not in TASKS:
            raise ValueError(f"Expected a task among {', '.join(TASKS)}; got {config_name!r}.")
        # In memory: a metric that a rank computes alone needs no cache file to gather from.
        super().__init__(config_name=config_name, keep_in_memory=True)
        self._pattern = re.compile("|".join(TASKS[config_name].answers))

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            features=datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string")),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        correct = self.correct(predictions, references)
        return {"accuracy": sum(correct) / len(correct)}

    def correct(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Return for each question whether its generation names the gold answer first."""
        pairs = zip(predictions, references, strict=True)
        return [self.extract(prediction) == reference.lower() for prediction, reference in pairs]

    def extract(self, text: str) -> str | None:
        """Return the first answer label that `text` names, None where it names none."""
        match = self._pattern.search(text.lower())
        return match[0] if match else None
