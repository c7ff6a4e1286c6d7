"""The splits from LLM-Adapters' math files."""

import logging
from pathlib import Path

from recipes.math.parts.metric import is_answer
from recipes.parts.records import RecordsByName, cut_validation, read_records, without
from recipes.parts.task import Splits

logger = logging.getLogger(__name__)

QUESTION_SETS = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps", "mathqa")
"""Folders of the question sets: those of the SMT paper in its order, then another of LLM-Adapters."""
MIXED_FILES = ("train.json", "math_10k.json")
TEST_QUESTIONS_FILE = "math_data.json"


def file_splits(source: str, validation: int, seed: int) -> Splits:
    """Return the splits from files.

    Drop each train record whose question is one of the test or validation sets, ignoring case, spaces and punctuation,
    and log how many were dropped.

    Args:
        source: a folder with `<question set>/test.json`, and `<question set>/train.json` or one of `MIXED_FILES`; or
            one file of train records that lies in a folder with `<question set>/test.json`.
        validation: number of random records moved from each train file to a validation set of its name; 0 for none.
        seed: seed of that choice.

    Raises:
        FileNotFoundError: `source` does not exist, or there is no train or no test file.
        ValueError: a file is empty or holds test questions for training, a record lacks a field, a train file has too
            few records, or the answer to a test or validation question is neither a number nor a letter.
    """
    train, test = _read_source(Path(source))
    train, held_out = cut_validation(without(train, test, "test"), validation, seed)
    _check_answers(test)
    _check_answers(held_out)
    return Splits.of([record for records in train.values() for record in records], held_out, test)


def _read_source(source: Path) -> tuple[RecordsByName, RecordsByName]:
    if source.name == TEST_QUESTIONS_FILE:
        raise ValueError(
            f"Expected train records, got {source}: 80 % of this file of LLM-Adapters are questions of its test sets. "
            "Train on math_10k.json, or on the sets' train.json."
        )
    if source.is_dir():
        return _read_train(source), _read_test(source)
    if source.is_file():
        return {source.stem: read_records(source)}, _read_test(source.parent)
    raise FileNotFoundError(
        f"Expected a folder of <question set>/test.json or a JSON file in one, got {str(source)!r}, which does not "
        "exist. Correct the path, or omit it to draw the data of GSM-Symbolic."
    )


def _read_train(folder: Path) -> RecordsByName:
    if found := _read_question_sets(folder, "train"):
        return found
    mixed = [folder / name for name in MIXED_FILES if (folder / name).is_file()]
    if len(mixed) != 1:
        raise FileNotFoundError(
            f"Expected <question set>/train.json or one of {', '.join(MIXED_FILES)} in {folder}, found "
            f"{' and '.join(path.name for path in mixed) or 'none'}. Pass the path of the train file itself."
        )
    return {mixed[0].stem: read_records(mixed[0])}


def _read_test(folder: Path) -> RecordsByName:
    found = _read_question_sets(folder, "test")
    if not found:
        raise FileNotFoundError(
            f"Expected <question set>/test.json in {folder} for at least one of {', '.join(QUESTION_SETS)}; found "
            "none. Arrange the files as in LLM-Adapters' dataset/ folder."
        )
    if missing := [name for name in QUESTION_SETS if name not in found]:
        logger.warning("%s has no test.json for %s", folder, ", ".join(missing))
    return found


def _read_question_sets(folder: Path, split: str) -> RecordsByName:
    files = {name: folder / name / f"{split}.json" for name in QUESTION_SETS}
    return {name: read_records(path) for name, path in files.items() if path.is_file()}


def _check_answers(questions: RecordsByName) -> None:
    for name, records in questions.items():
        if wrong := [record["answer"] for record in records if not is_answer(record["answer"])]:
            raise ValueError(
                f"Expected a number or a letter A to E as the answer to every question of {name}, got {wrong[0]!r}. "
                "Correct the record or remove it."
            )
