"""The expected overlap of random selections equals an exhaustive count."""

import itertools
from statistics import fmean

import pytest
import tiny
import torch

from recipes.selection_study.chance import chance
from smt_trainer import BlockSelection, Overlap
from smt_trainer.model.grid import BlockGrid


def choice(total: int, chosen) -> BlockSelection:
    """Return a selection of some of the `total` blocks of one module."""
    grid = BlockGrid(total, 1, 1, 1)
    return BlockSelection({"v": grid}, {"v": torch.tensor([(row, 0) for row in chosen])}, 100, tiny.config())


@pytest.mark.parametrize(("total", "chosen"), [(6, 1), (6, 2), (6, 5), (8, 3), (4, 4)])
def test_chance_is_the_mean_over_all_pairs_of_selections(total, chosen):
    selections = [choice(total, blocks) for blocks in itertools.combinations(range(total), chosen)]
    counted = fmean(Overlap.of(first, second).jaccard for first in selections for second in selections)
    assert chance(selections[0]) == pytest.approx(counted, rel=1e-12)
