"""What selections have in common, beside counting it out."""

import itertools
from statistics import fmean

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.selection_study.overlap import chance, jaccard, rank_correlation
from smt_trainer import BlockGrid, BlockSelection


def choice(total: int, chosen) -> BlockSelection:
    """Some of `total` blocks that lie half in one module, half in another."""
    grids = {name: BlockGrid(total // 2, 1, 1, 1) for name in ("q", "v")}
    places = [divmod(block, total // 2) for block in sorted(chosen)]
    indices = {name: [(row, 0) for module, row in places if module == number] for number, name in enumerate(grids)}
    return BlockSelection(
        grids, {name: torch.tensor(each) for name, each in indices.items() if each}, 100, tiny.config()
    )


@pytest.mark.parametrize(("total", "chosen"), [(6, 1), (6, 2), (6, 5), (8, 3), (4, 4)])
def test_chance_is_the_mean_over_all_pairs_of_selections(total, chosen):
    selections = [choice(total, blocks) for blocks in itertools.combinations(range(total), chosen)]
    counted = fmean(jaccard(first, second) for first in selections for second in selections)
    assert chance(selections[0]) == pytest.approx(counted, rel=1e-12)


@given(st.sets(st.integers(0, 9), min_size=1), st.sets(st.integers(0, 9), min_size=1))
def test_jaccard_tells_equal_blocks_of_different_modules_apart(first, second):
    assert jaccard(choice(10, first), choice(10, second)) == len(first & second) / len(first | second)


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=3, max_size=30))
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    first, second = zip(*pairs, strict=True)
    if min(len(set(first)), len(set(second))) < 2:
        return

    def ranks(values):
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    expected = np.corrcoef(ranks(first), ranks(second))[0, 1]
    halves = [
        {"q": torch.tensor([values[:2]]).float(), "v": torch.tensor([values[2:]]).float()} for values in (first, second)
    ]
    assert rank_correlation(*halves) == pytest.approx(expected, abs=1e-12)
