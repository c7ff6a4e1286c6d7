"""Measure the time that SMT adds to a step of the frozen model, each part where it runs.

Step times of one model vary by more than these parts take, so their sum measures SMT's distance to the floor better
than the ratio of step times.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from tqdm import tqdm

from recipes.benchmarks.parts.timing import Seconds, quartiles, timed
from recipes.benchmarks.parts.training import Training
from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse import functional, write_back

PARTS = {
    "block gradients": (functional.linear, "block_gradients"),
    "finding what is kept": (functional.linear, "find_origin"),
}
PARTS_OF_EXPERTS = {part: (functional.experts, name) for part, (_, name) in PARTS.items()}
OPTIMIZER, WRITE_BACK = "optimizer", "write-back"
PARTS_OF_PLAIN = PARTS | {WRITE_BACK: (write_back, "write_back")}
# Over a quantised weight, blocks are put into the dense copy that each product makes of it anyway.
PARTS_OF_QUANTISED = PARTS | {"putting blocks in": (BlockGrid, "scatter_")}


def own_work(training: Training, tokens: Tensor, rounds: int) -> dict[str, dict]:
    """Return part -> timer -> quartiles of its share of a step."""
    parts = PARTS_OF_QUANTISED if training.setting.base else PARTS_OF_PLAIN
    if training.setting.targets == "experts":
        parts = parts | PARTS_OF_EXPERTS
    shares: dict[str, list[Seconds]] = {part: [] for part in (*parts, OPTIMIZER)}
    for _ in tqdm(range(rounds), "own work"):
        with watched(training, parts) as spent:
            step = timed(partial(training.step, tokens))
        if WRITE_BACK in parts:
            # The optimizer's step ends with the hook that writes back.
            spent[OPTIMIZER] = Seconds(*(a - b for a, b in zip(spent[OPTIMIZER], spent[WRITE_BACK], strict=True)))
        for part, samples in shares.items():
            samples.append(Seconds(*(own / whole for own, whole in zip(spent[part], step, strict=True))))
    return {
        part: {timer: quartiles([getattr(sample, timer) for sample in samples]) for timer in Seconds._fields}
        for part, samples in shares.items()
    }


@contextlib.contextmanager
def watched(training: Training, parts: Mapping[str, tuple[Any, str]]) -> Generator[dict[str, Seconds]]:
    """Time each part within this context, summed over its calls."""
    spent = dict.fromkeys((*parts, OPTIMIZER), Seconds(0.0, 0.0))

    def watch(part: str, action: Callable) -> Callable:
        def watching(*args):
            results = []
            seconds = timed(lambda: results.append(action(*args)))
            spent[part] = Seconds(*map(sum, zip(spent[part], seconds, strict=True)))
            return results[0]

        return watching

    with contextlib.ExitStack() as stack:
        for part, (home, name) in parts.items():
            stack.enter_context(patch.object(home, name, watch(part, getattr(home, name))))
        stack.enter_context(patch.object(training.optimizer, "step", watch(OPTIMIZER, training.optimizer.step)))
        yield spent
