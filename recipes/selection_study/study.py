"""Warm-ups over several data orders, and the overlap of their selections."""

import itertools
from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from recipes.selection_study.chance import chance
from recipes.selection_study.warmup import scores_along
from smt_trainer import BlockScores, Overlap, SMTConfig
from smt_trainer.model.base import base_name
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.plotting import OverlapPoint
from smt_trainer.scores import make_scorer

# (score, seed, steps) -> the block scores after that many steps of one warm-up.
Outcomes = dict[tuple[str, int, int], BlockScores]


def run(
    model: nn.Module, loaders: Mapping[int, DataLoader], configs: Mapping[str, SMTConfig], steps: Sequence[int]
) -> Outcomes:
    """Run one warm-up for each data order and take every score along the way.

    Args:
        model: the base model.
        loaders: seed -> at least `max(steps)` batches in the order of that seed.
        configs: score -> configuration. All cut the same targets into the same blocks.
        steps: numbers of warm-up steps after which scores are taken.
    """
    targets = find_targets(model, next(iter(configs.values())))
    grids = target_grids(targets, next(iter(configs.values())))
    num_parameters, name = count_parameters(model), base_name(model)
    outcomes = {}
    for seed, loader in loaders.items():
        scorers = {score: make_scorer(targets, grids, config, seed) for score, config in configs.items()}
        batches = tqdm(itertools.islice(loader, max(steps)), f"warm-up, seed {seed}", max(steps))
        for step, every in scores_along(model, scorers, batches, steps):
            for score, scores in every.items():
                outcomes[score, seed, step] = BlockScores(grids, scores, num_parameters, configs[score], name)
    return outcomes


def compare(outcomes: Outcomes) -> list[OverlapPoint]:
    """Compare each selection with that of its longest warm-up and with those of other seeds after as many steps."""
    longest = max(steps for *_, steps in outcomes)
    seeds = list(dict.fromkeys(seed for _, seed, _ in outcomes))
    points = [
        _point(score, steps, "longest warm-up", str(seed), outcome, outcomes[score, seed, longest])
        for (score, seed, steps), outcome in outcomes.items()
    ]
    points += [
        _point(score, steps, "other seed", f"{first} and {second}", outcome, outcomes[score, second, steps])
        for first, second in itertools.combinations(seeds, 2)
        for (score, seed, steps), outcome in outcomes.items()
        if seed == first
    ]
    return points


def _point(score: str, steps: int, against: str, seed: str, first: BlockScores, second: BlockScores) -> OverlapPoint:
    common = Overlap.of(first, second)
    return OverlapPoint(score, steps, against, seed, common.jaccard, chance(first.select()), common.spearman)
