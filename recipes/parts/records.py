"""Records in files, and how questions are held out from them."""

import json
import logging
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.parts.task import FIELDS, Record

logger = logging.getLogger(__name__)

# Question set or file -> its records.
RecordsByName = dict[str, list[Record]]

IGNORED_CHARACTERS = str.maketrans("", "", string.punctuation + string.whitespace)


def read_records(path: Path, fields: Sequence[str] = FIELDS) -> list[Record]:
    """Read the records of a JSON array, with these fields only.

    Raises:
        ValueError: the file holds no array or an empty one, or a record has no text in a field.
    """
    records = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(records, list):
        raise ValueError(f"Expected a JSON array of records in {path}, got {str(records)[:80]!r}.")
    return with_fields(records, fields, str(path))


def with_fields(records: Sequence[Mapping[str, Any]], fields: Sequence[str], source: str) -> list[Record]:
    """Return the records of `source` with these fields only.

    Raises:
        ValueError: there are no records, or a record has no text in a field.
    """
    if not records:
        raise ValueError(f"Expected records in {source}, found none.")
    for number, record in enumerate(records):
        if wrong := [field for field in fields if not isinstance(record.get(field), str)]:
            raise ValueError(
                f"Expected the text fields {', '.join(fields)} in every record of {source}; record {number} has no "
                f"{', '.join(wrong)}. Add them as strings."
            )
    return [{field: record[field] for field in fields} for record in records]


def without(train: RecordsByName, held_out: RecordsByName, split: str) -> RecordsByName:
    """Drop the train records whose instruction is in `held_out`, and log how many.

    Instructions are equal if they differ in case, spaces and punctuation only.
    """
    forbidden = {_normalized(record) for records in held_out.values() for record in records}
    kept = {
        name: [record for record in records if _normalized(record) not in forbidden] for name, records in train.items()
    }
    dropped = sum(map(len, train.values())) - sum(map(len, kept.values()))
    logger.info("Dropped %d train records that equal a %s question", dropped, split)
    return kept


def _normalized(record: Record) -> str:
    return record["instruction"].lower().translate(IGNORED_CHARACTERS)


def cut_validation(train: RecordsByName, number: int, seed: int) -> tuple[RecordsByName, RecordsByName]:
    """Split `train` into the rest and `number` random validation records of each of its parts; none if 0.

    Records of the rest that equal a validation question are dropped.

    Raises:
        ValueError: a part has no more than `number` records.
    """
    if number == 0:
        return train, {}
    validation, rest = {}, {}
    for name, records in train.items():
        validation[name], rest[name] = cut(records, number, f"{seed} {name}", of=f" of {name}")
    return without(rest, validation, "validation"), validation


def cut(records: Sequence[Record], number: int, seed: int | str, of: str = "") -> tuple[list[Record], list[Record]]:
    """Return `number` random records and the others, both in the order of `records`.

    Raises:
        ValueError: there are no more than `number` records.
    """
    if number >= len(records):
        raise ValueError(
            f"Expected fewer than {len(records)} questions to hold out from as many records{of}, got {number}. "
            "Ask for fewer validation questions."
        )
    chosen = set(random.Random(seed).sample(range(len(records)), number))
    return (
        [record for index, record in enumerate(records) if index in chosen],
        [record for index, record in enumerate(records) if index not in chosen],
    )
