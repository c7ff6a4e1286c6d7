"""A step of the warm-up for one score, and the memory that it takes."""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from recipes.benchmarks.memory import resident
from recipes.benchmarks.models import tiny
from recipes.benchmarks.setting import Setting, device
from smt_trainer import SMTConfig, find_targets, make_scorer
from smt_trainer.targets import target_grids


class Scoring:
    """A frozen model and the scorer of its query, key and value projections, with the default blocks."""

    def __init__(self, model: nn.Module, score: str) -> None:
        self.model = model.requires_grad_(False)
        config = SMTConfig(score=score)
        targets = find_targets(model, config)
        self.scorer = make_scorer(targets, target_grids(targets, config), config)

    def step(self, tokens: Tensor) -> None:
        """Forward, and backward if the score needs it. The class of a sequence is its first token."""
        self.scorer.begin_batch({"labels": tokens})
        with self.scorer.attached():
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            if self.scorer.needs_backward:
                loss.backward()

    @property
    def accumulator_bytes(self) -> int:
        """What the scorer sums in."""
        return sum(total.nbytes for total in self.scorer.statistics())


def scoring_peaks(scores: Iterable[str], setting: Setting) -> dict[str, int]:
    """`scoring_peak_bytes` of each score, in a process of its own."""
    # Processes are forked from a server that has imported this module and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        running = {score: pool.submit(scoring_peak_bytes, score, setting) for score in scores}
        return {score: peak.result() for score, peak in tqdm(running.items(), "memory")}


def scoring_peak_bytes(score: str, setting: Setting) -> int:
    """Most memory of a step, accumulators included, above the model's: allocated on the GPU, or else resident."""
    # Code that is loaded on first use is none of it.
    small = Setting(tiny(2), setting.dtype, 1, 8)
    Scoring(small.build(), score).step(small.tokens())
    model, tokens = setting.build(), setting.tokens()
    plain = torch.cuda.memory_allocated() if device() == "cuda" else resident("VmRSS")
    scoring = Scoring(model, score)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        scoring.step(tokens)
        return torch.cuda.max_memory_allocated() - plain
    # The kernel's record of the peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    scoring.step(tokens)
    return resident("VmHWM") - plain
