"""Classes of training examples, for scores that rank by class.

The class of an example is the value of a column of the training data; or else its label: the label itself where there
is one for each example, the first that is not -100 where there is one for each token. A class is known by a 64-bit
integer, the label or a hash of the column's value, so that strings are classes too and all ranks agree.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError

CLASSES_KEY = "smt_classes"
NO_LABEL = -100


def class_column(config: SMTConfig) -> str | None:
    """The column that the configured score reads classes from; None for the labels, and for other scores."""
    return config.class_column if config.score == "qm_taylor" else None


def take_classes(inputs: MutableMapping[str, Any], column: str | None) -> Tensor:
    """The classes [B] of a batch's examples, int64 on the CPU, taken out of the batch where they are no input.

    Args:
        inputs: a collated batch.
        column: the configured `class_column`; None for the labels, which stay.

    Raises:
        SMTError: the batch has no classes, or its labels are none.
    """
    if column is not None:
        if CLASSES_KEY not in inputs:
            raise SMTError(
                f"the batches of the warm-up come without class_column={column!r}, since they are not collated by the "
                "trainer's data_collator. Leave get_train_dataloader as it is, or class_column at None."
            )
        return inputs.pop(CLASSES_KEY).cpu()
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.ndim not in (1, 2):
        found = f"{labels.dtype} of {list(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
        raise SMTError(
            "classes are read from integer labels, one for each example or one for each token, unless class_column "
            f"names a column of the training data; got labels: {found}."
        )
    labels = labels.cpu().long()
    if labels.ndim == 1:
        return labels
    first = (labels != NO_LABEL).int().argmax(1, keepdim=True)
    return labels.gather(1, first).squeeze(1)


def refuse_missing_column(dataset: Any, column: str | None) -> None:
    """Raise `SMTError` where a data set is known not to have a column; one that is read in order shows it later."""
    if column is None:
        return
    columns = getattr(dataset, "column_names", None)
    is_map = isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
    if columns is None and is_map and len(dataset) and isinstance(dataset[0], Mapping):
        columns = list(dataset[0])
    if columns is not None and column not in columns:
        raise _missing(column, columns)


def _missing(column: str, columns: list[str]) -> SMTError:
    return SMTError(f"train_dataset has no column class_column={column!r}; its columns are {', '.join(columns)}.")


@contextlib.contextmanager
def collating_classes(trainer, column: str | None) -> Iterator[None]:
    """Data loaders made within this context give the classes of a column beside each batch; those made later do not.

    The trainer's own collator is handed what it is in the main loop.

    Args:
        trainer: a `Trainer`, which drops unused columns.
        column: the configured `class_column`; None changes nothing.
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
    """Collates examples as `collator` does and adds their classes [B], from a column that it sees only if `is_input`.

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
    """A hash of a value: the same in every process, and for a number in whatever type it comes."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), signed=True)
