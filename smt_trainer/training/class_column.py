"""Add the class of each example, from a column of the training data, to the batches that the trainer collates.

Relies on `Trainer._set_signature_columns_if_needed`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from smt_trainer.errors import SMTError
from smt_trainer.scores.classes import CLASSES_KEY


def refuse_missing_column(dataset: Any, column: str | None) -> None:
    """Raise `SMTError` if a data set is known to lack a column; a streamed one may show it only when it is read."""
    if column is None:
        return
    columns = getattr(dataset, "column_names", None)
    is_map = hasattr(type(dataset), "__len__") and not isinstance(dataset, IterableDataset)
    if columns is None and is_map and len(dataset) and isinstance(dataset[0], Mapping):
        columns = list(dataset[0])
    if columns is not None and column not in columns:
        raise _missing(column, columns)


def _missing(column: str, columns: list[str]) -> SMTError:
    return SMTError(f"train_dataset has no column class_column={column!r}; its columns are {', '.join(columns)}.")


@contextlib.contextmanager
def collating_classes(trainer, column: str | None) -> Generator[None]:
    """Make the data loaders that are created within this context add the classes of a column to each batch.

    The trainer's own collator receives the same features as in training.

    Args:
        trainer: a `Trainer`, which drops unused columns.
        column: the column of the classes; None changes nothing.
    """
    if column is None:
        yield
        return
    trainer._set_signature_columns_if_needed()
    collator, columns = trainer.data_collator, trainer._signature_columns
    is_input = column in columns or not trainer.args.remove_unused_columns
    trainer.data_collator = ClassCollator(collator, column, is_input)
    trainer._signature_columns = [*columns, column]
    try:
        yield
    finally:
        trainer.data_collator, trainer._signature_columns = collator, columns


@dataclass
class ClassCollator:
    """Collate examples as `collator` does and add their classes [B] from a column.

    Attributes:
        collator: the trainer's own.
        column: where the classes are.
        is_input: whether `collator` sees the column.

    Raises:
        SMTError: an example has no such column.
    """

    collator: Any
    column: str
    is_input: bool

    def __call__(self, features: list[Mapping[str, Any]]) -> MutableMapping[str, Any]:
        for feature in features:
            if not isinstance(feature, Mapping) or self.column not in feature:
                raise _missing(self.column, list(feature) if isinstance(feature, Mapping) else ["not named"])
        classes = torch.tensor([_number(feature[self.column]) for feature in features])
        if not self.is_input:
            features = [{key: feature[key] for key in feature if key != self.column} for feature in features]
        batch = self.collator(features)
        batch[CLASSES_KEY] = classes
        return batch


def _number(value: Any) -> int:
    """Return a hash of a value that is the same in every process, and for numbers of Python, NumPy and torch."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), signed=True)
