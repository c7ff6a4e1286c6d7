"""What the warm-up must leave as it was: random states, and what the trainer counts."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSet

import numpy as np
import torch

# A tensor above this size is no counter.
LARGEST_COUNTER = 2**16


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
def plain_data_preserved(owner: object, apart: tuple[object, ...] = ()) -> Iterator[None]:
    """Restore the attributes of `owner` that hold plain data on exit, and remove those that were added.

    Trainers and their users gather metrics there in each training step. Plain data are numbers, text, small tensors and
    arrays, and containers of these; a container stays the same object.

    Args:
        owner: any object.
        apart: values to leave alone, such as data sets.
    """
    before = {
        name: (value, copy.deepcopy(value))
        for name, value in vars(owner).items()
        if not any(value is other for other in apart) and _is_plain(value)
    }
    names = set(vars(owner))
    try:
        yield
    finally:
        for name in [name for name, value in vars(owner).items() if name not in names and _is_plain(value)]:
            del vars(owner)[name]
        for name, (value, saved) in before.items():
            vars(owner)[name] = _refilled(value, saved)


def _refilled(container, content):
    """Give a container its content back, and return it; return the content of anything else."""
    if isinstance(container, (list, deque)):
        container.clear()
        container.extend(content)
    elif isinstance(container, (MutableMapping, MutableSet)):
        container.clear()
        container |= content  # pyrefly: ignore[unsupported-operation]  # dictionaries and sets have it
    else:
        return content
    return container


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_is_plain, value))
    if isinstance(value, (torch.Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        return size <= LARGEST_COUNTER and not getattr(value, "requires_grad", False)
    return value is None or isinstance(value, (int, float, complex, str, bytes, np.generic))
