"""The gradient warm-up: scores from a few batches, with the model left exactly as it was.

No weight is updated (the authors' code fine-tunes the whole model meanwhile and goes on from there; then base plus
delta would not give the model back). All parameters are frozen but for what the scorer observes, and each gradient is
consumed as soon as it exists, so the warm-up needs little more memory than a forward and a backward through a frozen
model.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from smt_trainer.scores import Scorer


def collect_scores(model: nn.Module, scorer: Scorer, steps: Iterable[Callable[[], None]]) -> dict[str, Tensor]:
    """Run the warm-up steps under the scorer's eyes.

    Args:
        model: the bare model, not wrapped for several devices.
        scorer: from `make_scorer`; without need of a warm-up it is only asked for its scores.
        steps: each item, when called, runs forward and backward of one optimizer step's batch.

    Returns:
        Module name -> scores [R, C]; the same on every rank.
    """
    if scorer.needs_warmup:
        with frozen(model), scorer.attached():
            for step in steps:
                step()
        average_over_ranks(scorer.statistics())
    return scorer.scores()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient within this context; afterwards those do that did before."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def rng_preserved() -> Iterator[None]:
    """The random states of Python, NumPy, the CPU and this process's GPU are restored on leaving."""
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
    """Private attributes of `owner` that hold plain data are restored on leaving: the metrics that some trainers, TRL's
    for one, gather in each training step."""
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


def average_over_ranks(statistics: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, one at a time; nothing to do on a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    for total in statistics:
        travelling = total if device is None else total.to(device)
        dist.all_reduce(travelling)
        total.copy_(travelling / dist.get_world_size())
