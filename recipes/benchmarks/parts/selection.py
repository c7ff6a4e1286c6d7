"""Time, file size and memory of a selection from scores drawn at random, on models that are never materialised."""

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
from smt_trainer import BlockSelection, SMTConfig, find_targets, make_scorer, select_blocks
from smt_trainer.model.targets import count_parameters, target_grids

CUTS = {
    "blocks of q, k, v": {},
    "blocks of all linears": {"target_modules": "all-linear"},
    "rows of all linears": {"target_modules": "all-linear", "granularity": "row"},
}


class Case:
    """One model, on the meta device, cut in one way; its methods are what is timed."""

    def __init__(self, shape: Shape, cut: str, seed: int) -> None:
        self.config = SMTConfig(score="random", **CUTS[cut])
        with torch.device("meta"):
            self.model = shape.build()
        self.plan()
        self.scores = make_scorer(self.targets, self.grids, self.config, seed).scores()

    def plan(self) -> None:
        """What comes before the warm-up."""
        self.targets = find_targets(self.model, self.config)
        self.grids = target_grids(self.targets, self.config)
        self.num_parameters = count_parameters(self.model)

    def select(self) -> None:
        """What comes after it."""
        self.selection = select_blocks(self.scores, self.grids, self.config, self.num_parameters)

    def times(self, path: Path) -> dict[str, float]:
        """Seconds of each action, once; `path` holds the selection afterwards."""
        return {
            "plan_seconds": seconds(self.plan),
            "select_seconds": seconds(self.select),
            "save_seconds": seconds(lambda: self.selection.save(path)),
            "load_seconds": seconds(lambda: BlockSelection.load(path)),
        }

    def sizes(self, path: Path) -> dict[str, int]:
        """Counts, the first target's block, the file's size; and what a warm-up keeps: one float32 for each weight with
        `grad_l1`, for each block with `grad_signed`."""
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
    """One row for each model and cut: median seconds over `rounds`, each of which visits every case once."""
    cases = {(model, cut): Case(shape, cut, seed) for model, shape in models.items() for cut in CUTS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "selection.json")
        samples = [{key: case.times(path) for key, case in cases.items()} for _ in tqdm(range(rounds), "rounds")]
        sizes = {key: case.sizes(path) for key, case in cases.items()}
    # Processes are forked from a server that has imported this module and done nothing else.
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
    """Most resident memory that `select_blocks` takes beyond model and scores; for a process of its own, on Linux."""
    # Code that is loaded on first use is none of it.
    Case(tiny(3), cut, seed).select()
    case = Case(shape, cut, seed)
    # The kernel's record of the peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    case.select()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def seconds(action: Callable[[], object]) -> float:
    """Processor time that an action takes: unlike time on the clock it does not depend on what else is running."""
    return timeit.timeit(action, timer=time.process_time, number=1)
