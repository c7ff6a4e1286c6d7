"""GSM-Symbolic: questions of GSM8K as templates, whose names and numbers are drawn (Mirzadeh et al., 2024).

    train templates        -> train | validation "new numbers" | test "new numbers"
    validation templates   ->         validation "new templates"
    test templates         ->                                    test "new templates"

No two records of a template have the same numbers in their questions. So the set "new numbers" asks for a computation
that training showed with other numbers, and "new templates" for one that it never showed.
"""

import random
import re
from typing import Any

from recipes.math.parts.generators import Generator, generators
from recipes.parts.records import Record, cut
from recipes.parts.task import Splits

SEED = 20260101
"""Seed of the templates' roles, of all draws and of the test sets."""
TEST_TEMPLATES = 16
VALIDATION_TEMPLATES = 8
RECORDS_PER_TEMPLATE = 150
TEST_QUESTIONS = 500
"""Number of questions in each of the two test sets."""
MOST_DRAWS_PER_RECORD = 20
TEMPLATE = "template"
"""Column that names the template of a record."""
NEW_NUMBERS, NEW_TEMPLATES = "new numbers", "new templates"

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def symbolic_splits(validation: int, seed: int) -> Splits:
    """Return the splits, drawn from the templates in about a second.

    Each record names its template. `seed` only chooses the validation questions. Without them, the train and test sets
    are the same for every seed.

    Args:
        validation: number of questions in each validation set; 0 for no validation.
        seed: seed of that choice.

    Raises:
        FetchError: the wheel is damaged, or is not in the cache and could not be downloaded.
        ValueError: there are fewer than `validation` questions, or a solution does not end in its answer.
    """
    templates = generators()
    order = random.Random(SEED).sample(sorted(templates), len(templates))
    roles = {
        "test": order[:TEST_TEMPLATES],
        "validation": order[TEST_TEMPLATES : TEST_TEMPLATES + VALIDATION_TEMPLATES],
        "train": order[TEST_TEMPLATES + VALIDATION_TEMPLATES :],
    }
    pools = {
        role: [record | {TEMPLATE: str(number)} for number in numbers for record in draw(templates[number], number)]
        for role, numbers in roles.items()
    }
    new_numbers, train = cut(pools["train"], TEST_QUESTIONS, SEED)
    new_templates, _ = cut(pools["test"], TEST_QUESTIONS, SEED)
    test = {NEW_NUMBERS: new_numbers, NEW_TEMPLATES: new_templates}
    held_out = {}
    if validation:
        held_out[NEW_NUMBERS], train = cut(train, validation, seed)
        held_out[NEW_TEMPLATES], _ = cut(pools["validation"], validation, seed)
    return Splits.of(train, held_out, test)


def draw(generate: Generator, number: int) -> list[Record]:
    """Return `RECORDS_PER_TEMPLATE` records of the template `number`, or fewer if its draws repeat the same numbers."""
    rng = random.Random(f"{SEED} {number}")
    records: dict[tuple[str, ...], Record] = {}
    for _ in range(MOST_DRAWS_PER_RECORD * RECORDS_PER_TEMPLATE):
        record = _record(generate(rng))
        records.setdefault(numbers_in(record["instruction"]), record)
        if len(records) == RECORDS_PER_TEMPLATE:
            break
    return list(records.values())


def numbers_in(question: str) -> tuple[str, ...]:
    """Return the numbers that `question` writes in digits, in order."""
    return tuple(NUMBER.findall(question))


def _record(example: dict[str, Any]) -> Record:
    answer, solution = example["answer"], example["metadata"]["answer_cot"]
    lines = [line.strip() for line in solution.splitlines()]
    if lines[-1] != f"#### {answer}":
        raise ValueError(
            f"Expected a solution that ends in '#### {answer}', got {lines[-1]!r} for {example['question']!r}. "
            "Add its template to FLAWED in recipes/math/parts/generators.py."
        )
    return {"instruction": example["question"], "input": "", "output": "\n".join(lines), "answer": answer}
