"""Accuracy of generated texts, question by question."""

from collections.abc import Sequence

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of generated texts that are right. `config_name` names the rule or the question set.

    `compute(predictions=texts, references=answers)` returns {"accuracy": share in [0, 1]}.

    A subclass sets `description` and implements `is_right`.
    """

    description: str

    def __init__(self, config_name: str):
        # Each rank computes its metric alone, so there is no cache file to gather from.
        super().__init__(config_name=config_name, keep_in_memory=True)

    def is_right(self, text: str, gold: str) -> bool:
        """Tell whether a generated text gives the gold answer."""
        raise NotImplementedError

    def correct(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Tell for each question whether its generation gives the gold answer."""
        return [self.is_right(*pair) for pair in zip(predictions, references, strict=True)]

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features(predictions=text, references=text)
        return evaluate.MetricInfo(description=self.description, citation="", features=features)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        correct = self.correct(predictions, references)
        return {"accuracy": sum(correct) / len(correct)}
