"""What the warm-up must leave as it was: random states, and the counters of the trainer."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def rng_preserved() -> Iterator[None]:
    """Restore the random states of Python, NumPy, the CPU and this process's GPU on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def counters_preserved(owner: object) -> Iterator[None]:
    """Restore the private attributes of `owner` that hold plain data on exit.

    Some trainers, TRL's for one, gather metrics there in each training step.
    """
    counters = {
        name: copy.deepcopy(value) for name, value in vars(owner).items() if name.startswith("_") and _is_plain(value)
    }
    try:
        yield
    finally:
        vars(owner).update(counters)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))
