"""Measure time, file size and memory of a selection from random scores, with models on the meta device."""

import multiprocessing
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.benchmarks.parts.models import Shape, tiny
from recipes.benchmarks.parts.resident import reset_peak, resident
from smt_trainer import BlockSelection, SMTConfig
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.selection.choose import select_blocks

CUTS = {
    "blocks of q, k, v": {},
    "blocks of all linears": {"target_modules": "all-linear"},
    "rows of all linears": {"target_modules": "all-linear", "granularity": "row"},
}


class Case:
    """One model on the meta device, cut into blocks in one way. Its methods are timed."""

    def __init__(self, shape: Shape, cut: str, seed: int) -> None:
        self.config = SMTConfig(score="random", **CUTS[cut])
        with torch.device("meta"):
            self.model = shape.build()
        self.plan()
        self.scores = make_scorer(self.targets, self.grids, self.config, seed).scores()

    def plan(self) -> None:
        """Do the work before the warm-up: find targets, cut them into blocks, count parameters."""
        self.targets = find_targets(self.model, self.config)
        self.grids = target_grids(self.targets, self.config)
        self.num_parameters = count_parameters(self.model)

    def select(self) -> None:
        """Do the work after the warm-up: choose the blocks."""
        self.selection = select_blocks(self.scores, self.grids, self.config, self.num_parameters)

    def times(self, path: Path) -> dict[str, float]:
        """Run each action once and return its seconds. Save the selection to `path`."""
        return {
            "plan_seconds": seconds(self.plan),
            "select_seconds": seconds(self.select),
            "save_seconds": seconds(lambda: self.selection.save(path)),
            "load_seconds": seconds(lambda: BlockSelection.load(path)),
        }

    def sizes(self, path: Path) -> dict[str, int]:
        """Return counts, the block shape of the first target, the file size, and the bytes that a warm-up keeps.

        A warm-up keeps one float32 for each weight with `grad_l1`, and for each block with `grad_signed`.
        """
        self.selection.save(path)
        blocks = sum(grid.num_blocks for grid in self.grids.values())
        return {
            "targets": len(self.targets),
            "block_shape": next(iter(self.grids.values())).block_shape,
            "blocks": blocks,
            "chosen": self.selection.num_blocks,
            "json_bytes": path.stat().st_size,
            "grad_l1_bytes": 4 * sum(linear.weight.numel() for linear in self.targets.values()),
            "grad_signed_bytes": 4 * blocks,
        }


def measure_selection(models: dict[str, Shape], rounds: int, seed: int) -> list[dict]:
    """Return one row for each model and cut, with median seconds over `rounds`. Each round runs every case once."""
    cases = {(model, cut): Case(shape, cut, seed) for model, shape in models.items() for cut in CUTS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "selection.json")
        samples = [{key: case.times(path) for key, case in cases.items()} for _ in tqdm(range(rounds), "rounds")]
        sizes = {key: case.sizes(path) for key, case in cases.items()}
    # Each process is forked from a server that has only imported this module.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        running = {(model, cut): pool.submit(select_peak_bytes, models[model], cut, seed) for model, cut in cases}
        peaks = {key: peak.result() for key, peak in tqdm(running.items(), "memory")}
    return [
        {"model": key[0], "cut": key[1]}
        | sizes[key]
        | {name: statistics.median(sample[key][name] for sample in samples) for name in samples[0][key]}
        | {"peak_bytes": peaks[key]}
        for key in cases
    ]


def select_peak_bytes(shape: Shape, cut: str, seed: int) -> int:
    """Return the peak resident memory of `select_blocks` above model and scores. Needs its own process, on Linux."""
    # A small case first, so that code loaded on first use is not measured.
    Case(tiny(3), cut, seed).select()
    case = Case(shape, cut, seed)
    reset_peak()
    before = resident("VmRSS")
    case.select()
    return max(0, resident("VmHWM") - before)


def seconds(action: Callable[[], object]) -> float:
    """Return the processor time of an action. Unlike clock time, it does not depend on other programs."""
    return timeit.timeit(action, timer=time.process_time, number=1)
