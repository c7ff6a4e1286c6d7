"""Warm-ups over several data orders, and what their selections have in common."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from recipes.selection_study.overlap import chance, jaccard, rank_correlation
from recipes.selection_study.warmup import scores_along
from smt_trainer import BlockSelection, OverlapPoint, SMTConfig, find_targets, make_scorer, select_blocks
from smt_trainer.selection import base_name
from smt_trainer.targets import count_parameters, target_grids

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one score gave after some steps of one warm-up."""

    scores: Scores
    selection: BlockSelection


# (score, seed, steps) -> outcome.
Outcomes = dict[tuple[str, int, int], Outcome]


def run(
    model: nn.Module, loaders: Mapping[int, DataLoader], configs: Mapping[str, SMTConfig], steps: Sequence[int]
) -> Outcomes:
    """Warm the model up once for each data order, and choose blocks by every score along the way.

    Args:
        model: the base model.
        loaders: seed -> batches in its order, at least `max(steps)`.
        configs: score -> configuration; all cut the same targets into the same blocks.
        steps: numbers of warm-up steps after which blocks are chosen.
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
                selection = select_blocks(scores, grids, configs[score], num_parameters, name)
                outcomes[score, seed, step] = Outcome(scores, selection)
    return outcomes


def compare(outcomes: Outcomes) -> list[OverlapPoint]:
    """Each selection beside that of its longest warm-up, and beside those of other seeds after as many steps."""
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


def _point(score: str, steps: int, against: str, seed: str, first: Outcome, second: Outcome) -> OverlapPoint:
    common = jaccard(first.selection, second.selection)
    correlation = rank_correlation(first.scores, second.scores)
    return OverlapPoint(score, steps, against, seed, common, chance(first.selection), correlation)
