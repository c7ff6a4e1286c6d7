"""Refuse training data that can be read only once: the warm-up and the main loop both read them from the beginning.

An `__iter__` may always return the same iterator, or be a generator over one. So the first example is read twice, each
time from a new iterator and with the same random numbers. Streamed data sets of `datasets` start again by construction,
so they are not read, which may take long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from smt_trainer.errors import SMTError
from smt_trainer.training.preserved import rng_preserved

NOTHING = object()


def refuse_data_read_once(dataset: Any) -> None:
    """Raise `SMTError` if an iterable data set does not start again from its beginning."""
    if not isinstance(dataset, (IterableDataset, Iterator)) or type(dataset).__module__ == "datasets.iterable_dataset":
        return
    if iter(dataset) is iter(dataset):
        raise SMTError(f"{_READ_ONCE}. {_REMEDY}")
    first, second = _first_example(dataset), _first_example(dataset)
    if not _same(first, second):
        raise SMTError(
            f"{_READ_ONCE}: the second time, it begins with another example. Two examples were taken from it to find "
            f"out, so create it again. {_REMEDY}"
        )


_READ_ONCE = "train_dataset can be read only once, but the warm-up and the main loop both read it"
_REMEDY = (
    "Make its __iter__ start from the beginning each time, in the same order under the same seed, or pass an existing "
    "selection in SMTConfig(selection=...)."
)


def _first_example(dataset: Any) -> Any:
    with rng_preserved():
        return next(iter(dataset), NOTHING)


def _same(ours: Any, theirs: Any) -> bool:
    """Compare two examples; what is neither plain data nor an array or a container counts as equal."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.shape == theirs.shape and bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
    if isinstance(ours, np.ndarray):
        return ours.shape == theirs.shape and all(map(_same, ours.ravel().tolist(), theirs.ravel().tolist()))
    if hasattr(ours, "__array_interface__"):
        return _same(np.asarray(ours), np.asarray(theirs))
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, Sequence) and not isinstance(ours, (str, bytes)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    is_plain = isinstance(ours, (int, float, complex, str, bytes))
    return not is_plain or ours == theirs or (ours != ours and theirs != theirs)
