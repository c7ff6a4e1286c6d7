"""Accuracy of generated answers, as LLM-Adapters scores them."""

import re
from collections.abc import Sequence

import datasets
import evaluate

from recipes.commonsense.parts.question_sets import QUESTION_SETS

_DESCRIPTION = """Share of generations whose first named answer is the gold one.

Text and answer are lower-cased. The first answer label of the set anywhere in the text counts. A text without one is
wrong.
"""


class ChoiceAccuracy(evaluate.Metric):
    """Accuracy on one question set, named by `config_name`.

    `compute(predictions=texts, references=answers)` returns {"accuracy": share in [0, 1]}.
    """

    def __init__(self, config_name: str):
        if config_name not in QUESTION_SETS:
            raise ValueError(f"Expected a question set among {', '.join(QUESTION_SETS)}; got {config_name!r}.")
        # Each rank computes its metric alone, so there is no cache file to gather from.
        super().__init__(config_name=config_name, keep_in_memory=True)
        self._pattern = re.compile("|".join(QUESTION_SETS[config_name].answers))

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
        """Tell for each question whether its generation names the gold answer first."""
        pairs = zip(predictions, references, strict=True)
        return [self.extract(prediction) == reference.lower() for prediction, reference in pairs]

    def extract(self, text: str) -> str | None:
        """Return the first answer label in `text`, or None."""
        match = self._pattern.search(text.lower())
        return match[0] if match else None
