"""Step times of many trainings, run in turn, and their ratios within each round."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recipes.benchmarks.parts.methods import Variant
from recipes.benchmarks.parts.training import Training


class Seconds(NamedTuple):
    """Seconds of one step: processor time over all threads, and time on the clock."""

    processor: float
    clock: float


Round = Mapping[Variant, Seconds]


def time_rounds(trainings: Mapping[Variant, Training], tokens: Tensor, rounds: int) -> list[Round]:
    """Time one step of each training per round, so that a slow spell of the machine slows all of them.

    Each round has a new order, since a step finds memory and caches as the one before left them.
    """
    samples, order, shuffle = [], list(trainings), random.Random(0).shuffle
    for _ in tqdm(range(rounds), "rounds"):
        shuffle(order)
        gc.collect()
        gc.disable()
        samples.append({variant: timed(partial(trainings[variant].step, tokens)) for variant in order})
        gc.enable()
    return samples


def timed(action: Callable[[], object]) -> Seconds:
    """Run an action, wait for the GPU, and return the seconds."""
    synchronize()
    processor, clock = time.process_time(), time.perf_counter()
    action()
    synchronize()
    return Seconds(time.process_time() - processor, time.perf_counter() - clock)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(rounds: list[Round], variant: Variant) -> dict:
    """Return timer -> quartiles of a variant's step times."""
    return {timer: quartiles([getattr(each[variant], timer) for each in rounds]) for timer in Seconds._fields}


def ratios(rounds: list[Round], variant: Variant, to: Sequence[Variant]) -> dict:
    """Return timer -> quartiles of a variant's time over the mean time of others in the same round."""
    return {
        timer: quartiles(
            [getattr(each[variant], timer) / fmean(getattr(each[other], timer) for other in to) for each in rounds]
        )
        for timer in Seconds._fields
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Return lower quartile, median and upper quartile."""
    return dict(zip(("lower", "median", "upper"), np.quantile(values, (0.25, 0.5, 0.75)).tolist(), strict=True))
