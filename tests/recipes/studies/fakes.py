"""Runs without a model, so that the queue can be tested with real processes."""

import os
import time
from dataclasses import asdict
from pathlib import Path

from recipes.studies.parts.run import Run

BEST_RATE = 1e-3


def perform(run: Run) -> dict:
    """Return a result at once. The loss is smallest at `BEST_RATE`."""
    loss = abs(run.rate - BEST_RATE) + 0.01 * run.seed
    sets = {"new numbers": [loss, loss + 1], "new templates": [loss, loss]}
    values = {"loss": sets, "forgetting": {"general text": [3.0, 4.0], "science": [0.0, 1.0]}}
    return {
        "run": asdict(run),
        "trained_parameters": 10,
        "values": values,
        "means": {measure: {name: sum(row) / 2 for name, row in sets.items()} for measure, sets in values.items()},
        "seconds": 1.0,
        "hardware": "none",
        "versions": {"torch": "0"},
    }


def perform_widely(run: Run) -> dict:
    """Return a result with as many templates as any other."""
    return perform(run) | {"templates": {"new numbers": [7, 8]}}


def perform_once_killed(run: Run) -> dict:
    """End the whole process the first time that a run with seed 2 is made, as a lack of memory does."""
    mark = Path(os.environ["KILLED_ONCE"])
    if run.seed == 2 and not mark.exists():
        mark.touch()
        os._exit(9)
    return perform(run)


def perform_badly(run: Run) -> dict:
    """Fail for every run of LoRA."""
    if run.method == "lora":
        raise RuntimeError("no such adapter")
    return perform(run)


def perform_for_ever(run: Run) -> dict:
    """Write down the process that makes the run, which never ends."""
    Path(os.environ["WORKERS"]).joinpath(str(os.getpid())).touch()
    while True:
        time.sleep(0.1)
