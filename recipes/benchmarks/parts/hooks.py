"""Measure the time that the scorers' hooks add to a warm-up step, on models with many tiny targets."""

import torch

from recipes.benchmarks.parts.models import tiny
from recipes.benchmarks.parts.selection import seconds
from smt_trainer import SMTConfig
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.scores.preserved import frozen

SCORES = ("grad_l1", "grad_signed")


def measure_warmup(layers: int, rounds: int, seed: int) -> dict:
    """Return the seconds of forward and backward through a frozen model, and the seconds that each scorer adds."""
    torch.manual_seed(seed)
    model = tiny(layers).build().train()
    # Otherwise nothing in a frozen model would require a gradient.
    model.enable_input_require_grads()
    tokens = torch.randint(model.config.vocab_size, (1, 8))
    targets = find_targets(model, SMTConfig())
    grids = target_grids(targets, SMTConfig())

    def step() -> float:
        return seconds(lambda: model(input_ids=tokens, labels=tokens).loss.backward())

    steps = {score: [] for score in ("plain", *SCORES)}
    with frozen(model):
        step()
        for _ in range(rounds):
            steps["plain"].append(step())
            for score in SCORES:
                with make_scorer(targets, grids, SMTConfig(score=score)).attached():
                    steps[score].append(step())
    # The lower quartile, since other programs can only slow a step down.
    plain, *scored = (sorted(times)[len(times) // 4] for times in steps.values())
    row = {"layers": layers, "targets": len(targets), "plain_seconds": plain}
    return row | {f"{score}_added_seconds": time - plain for score, time in zip(SCORES, scored, strict=True)}
