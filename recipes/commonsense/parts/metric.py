"""Accuracy of generated answers, as LLM-Adapters scores them."""

import re

from recipes.commonsense.parts.question_sets import QUESTION_SETS
from recipes.parts.accuracy import Accuracy

_DESCRIPTION = """Share of generations whose first named answer is the gold one.

Text and answer are lower-cased. The first answer label of the set anywhere in the text counts. A text without one is
wrong.
"""


class ChoiceAccuracy(Accuracy):
    """Accuracy on one question set, named by `config_name`."""

    description = _DESCRIPTION

    def __init__(self, config_name: str):
        if config_name not in QUESTION_SETS:
            raise ValueError(f"Expected a question set among {', '.join(QUESTION_SETS)}; got {config_name!r}.")
        super().__init__(config_name)
        self._pattern = re.compile("|".join(QUESTION_SETS[config_name].answers))

    def is_right(self, text: str, gold: str) -> bool:
        """Tell whether a generation names the gold answer first."""
        return self.extract(text) == gold.lower()

    def extract(self, text: str) -> str | None:
        """Return the first answer label in `text`, or None."""
        match = self._pattern.search(text.lower())
        return match[0] if match else None
