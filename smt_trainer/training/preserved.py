"""Restore what the warm-up must not change: random states, generators, and the plain data that a trainer gathers."""

from __future__ import annotations

import contextlib
import random
import types
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch

# Tensors with more elements than this are no counters, and are left alone.
LARGEST_COUNTER = 2**16
# Lists that are longer hold data, and not parts of an object.
LONGEST_LIST = 100
OPAQUE = (type, types.ModuleType, torch.Tensor)


@contextlib.contextmanager
def rng_preserved() -> Generator[None]:
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
def generators_preserved(*owners: object) -> Generator[None]:
    """Restore on exit the states of the random generators that objects have as attributes or in lists, as a collator
    with a seed of its own does, and the attributes that held none yet."""
    owners = tuple(owner for owner in owners if hasattr(owner, "__dict__"))
    before = [dict(vars(owner)) for owner in owners]
    held = [one for attributes in before for value in attributes.values() for one in _listed(value)]
    states = [(one, _state_of(one)) for one in held if _is_generator(one)]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            for name in [name for name, value in vars(owner).items() if _is_generator(value)]:
                if name in attributes:
                    vars(owner)[name] = attributes[name]
                else:
                    del vars(owner)[name]
        for generator, state in states:
            _set_state(generator, state)


def reachable(*roots: object) -> list[object]:
    """Return objects, and those that they hold as attributes or in lists, to the depth of `dataset.transform.parts[0]`.
    Data are left out."""
    found: dict[int, object] = {}
    level = list(roots)
    for _ in range(3):
        level = [one for one in level if hasattr(one, "__dict__") and not isinstance(one, OPAQUE)]
        level = list({id(one): one for one in level if id(one) not in found}.values())
        found |= {id(one): one for one in level}
        level = [part for one in level for value in vars(one).values() for part in _listed(value)]
    return list(found.values())


def _listed(value: object) -> Iterable[object]:
    """Return the members of a short list or tuple, or the value itself in a list."""
    return value if isinstance(value, (list, tuple)) and len(value) <= LONGEST_LIST else [value]


def _is_generator(value: object) -> bool:
    return isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextlib.contextmanager
def plain_data_preserved(owner: object, apart: tuple[object, ...] = ()) -> Generator[None]:
    """Restore the attributes of `owner` that hold plain data on exit, and remove those that were added.

    Trainers and their users gather metrics there in each training step. Plain data are numbers, strings, small tensors
    and arrays, and containers of these; each stays the same object.

    Args:
        owner: any object.
        apart: values to leave alone, such as data sets.
    """
    before = {
        name: value
        for name, value in vars(owner).items()
        if not any(value is other for other in apart) and _is_plain(value)
    }
    names, contents = set(vars(owner)), _contents(before.values())
    try:
        yield
    finally:
        for name in [name for name, value in vars(owner).items() if name not in names and _is_plain(value)]:
            del vars(owner)[name]
        vars(owner).update(before)
        for holder, content in contents:
            _refill(holder, content)


def _contents(values: Iterable[object]) -> list[tuple[Any, Any]]:
    """Return all mutable objects within plain values (lists, dictionaries, tensors and others), each with a copy of its
    content. The copies are shallow, so that references between the objects survive."""
    found: dict[int, tuple[Any, Any]] = {}
    left = deque(values)
    while left:
        value = left.popleft()
        if id(value) in found:
            continue
        if isinstance(value, torch.Tensor):
            found[id(value)] = value, value.detach().clone()
        elif isinstance(value, (list, dict, set, deque, np.ndarray)):
            found[id(value)] = value, value.copy()
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple, deque)):
            left.extend(value)
    return list(found.values())


def _refill(holder: Any, content: Any) -> None:
    """Restore the content of a container, a tensor or an array."""
    if isinstance(holder, torch.Tensor):
        with torch.inference_mode():  # the tensor may have been made in this mode
            holder.copy_(content)
    elif isinstance(holder, np.ndarray):
        if holder.flags.writeable:
            holder[...] = content
    elif isinstance(holder, (list, deque)):
        holder.clear()
        holder.extend(content)
    else:
        holder.clear()
        holder.update(content)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_is_plain, value))
    if isinstance(value, (torch.Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        return size <= LARGEST_COUNTER and not getattr(value, "requires_grad", False)
    return value is None or isinstance(value, (int, float, complex, str, bytes, np.generic))
