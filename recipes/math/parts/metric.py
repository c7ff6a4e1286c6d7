"""Accuracy of generated solutions, by the number or letter that they end in."""

import re
from collections.abc import Callable

from recipes.parts.accuracy import Accuracy

_DESCRIPTION = """Share of generations whose final answer is the gold one.

Numbers may have commas, and are equal up to 0.001. The rule "strict" reads the number after the last "####"; a text
without one is wrong. The rule "flexible" reads the last number of the text, as LLM-Adapters does. If the gold answer is
a letter (AQuA, MathQA), "flexible" reads the letter A to E after the first "answer is", else the first A to E that
stands alone. (LLM-Adapters takes the first capital A to E anywhere, also that of "Because".)
"""

TOLERANCE = 1e-3
LETTERS = frozenset("ABCDE")

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
STATED_LETTER = re.compile(r"(?i:answer\s+is)\s*:?\s*\(?([A-E])\b")
LONE_LETTER = re.compile(r"\b([A-E])\b")


class SolutionAccuracy(Accuracy):
    """Accuracy by the rule `config_name`, "strict" or "flexible"."""

    description = _DESCRIPTION

    def __init__(self, config_name: str):
        if config_name not in NUMBER_RULES:
            raise ValueError(f"Expected a rule among {', '.join(NUMBER_RULES)}; got {config_name!r}.")
        super().__init__(config_name)
        self._final_number = NUMBER_RULES[config_name]

    def is_right(self, text: str, gold: str) -> bool:
        """Tell whether a generation ends in the gold answer, a number or a letter A to E."""
        if gold in LETTERS:
            return letter(text) == gold
        number = self._final_number(text.replace(",", ""))
        return number is not None and abs(float(number) - float(gold.replace(",", ""))) <= TOLERANCE


def is_answer(gold: str) -> bool:
    """Tell whether the metric can compare with `gold`: a number, or a letter A to E."""
    return gold in LETTERS or NUMBER.fullmatch(gold.replace(",", "")) is not None


def marked_number(text: str) -> str | None:
    """Return the number after the last "####" of a text without commas, or None."""
    _, mark, end = text.rpartition("####")
    match = NUMBER.match(end.lstrip())
    return match[0] if mark and match else None


def last_number(text: str) -> str | None:
    """Return the last number of a text without commas, or None."""
    return (NUMBER.findall(text) or [None])[-1]


def letter(text: str) -> str | None:
    """Return the letter that `text` states as its answer, or None."""
    match = STATED_LETTER.search(text) or LONE_LETTER.search(text)
    return match[1] if match else None


NUMBER_RULES: dict[str, Callable[[str], str | None]] = {"strict": marked_number, "flexible": last_number}
