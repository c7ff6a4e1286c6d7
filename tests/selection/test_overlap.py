"""How much two selections agree."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import rank_correlation

from smt_trainer import BlockScores, BlockSelection, Overlap, SMTConfig, SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.selection.overlap import spearman

GRIDS = {f"layers.{layer}.attn.{leaf}": BlockGrid(8, 12, 4, 4) for layer in range(2) for leaf in ("q_proj", "v_proj")}
EVERY = [(name, row, column) for name in GRIDS for row in range(2) for column in range(3)]


def selection_of(blocks) -> BlockSelection:
    block_indices = {}
    for name, row, column in sorted(blocks):
        block_indices.setdefault(name, []).append((row, column))
    return BlockSelection(GRIDS, {name: torch.tensor(found) for name, found in block_indices.items()}, 500, SMTConfig())


def scores_of(values, budget=5) -> BlockScores:
    parts = torch.tensor(values, dtype=torch.float32).view(4, 2, 3)
    return BlockScores(GRIDS, dict(zip(GRIDS, parts, strict=True)), 500, SMTConfig(budget=budget, score="random"))


some_blocks = st.sets(st.sampled_from(EVERY), min_size=1)
some_scores = st.lists(st.integers(0, 5), min_size=24, max_size=24).filter(lambda values: any(values))


@given(some_blocks, some_blocks)
def test_the_overlap_is_that_of_two_sets_as_a_whole_and_by_projection(ours, theirs):
    found = Overlap.of(selection_of(ours), selection_of(theirs))
    for overlap, leaf in [(found, "_proj"), *((part, leaf) for leaf, part in found.by_projection.items())]:
        first, second = ({block for block in blocks if block[0].endswith(leaf)} for blocks in (ours, theirs))
        assert (overlap.first, overlap.second, overlap.shared) == (len(first), len(second), len(first & second))
        if first | second:
            assert overlap.jaccard == len(first & second) / len(first | second)
        assert overlap.spearman is None
    assert list(found.by_projection) == ["q_proj", "v_proj"]


@given(some_blocks)
def test_a_selection_overlaps_with_itself_fully_and_with_the_rest_not_at_all(blocks):
    ours = selection_of(blocks)
    assert Overlap.of(ours, ours).jaccard == 1
    if rest := set(EVERY) - blocks:
        assert Overlap.of(ours, selection_of(rest)).jaccard == 0


@given(some_scores, some_scores)
def test_the_rank_correlation_of_scores_is_that_of_the_slow_twin_in_either_order(ours, theirs):
    found = Overlap.of(scores_of(ours), scores_of(theirs))
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        assert math.isnan(found.spearman)
    else:
        assert found.spearman == pytest.approx(rank_correlation(ours, theirs), abs=1e-12)
        assert Overlap.of(scores_of(theirs), scores_of(ours)).spearman == pytest.approx(found.spearman, abs=1e-12)
    assert found.by_projection["q_proj"].spearman == pytest.approx(
        spearman(*(torch.tensor(values[:6] + values[12:18]) for values in (ours, theirs))), nan_ok=True
    )


@given(some_scores, st.integers(1, 24))
def test_scores_overlap_by_what_they_select_themselves(values, budget):
    scores = scores_of(values, budget)
    both, one = Overlap.of(scores, scores), Overlap.of(scores.select(), scores)
    assert both.first == both.shared == one.shared == budget
    assert one.spearman is None
    if len(set(values)) > 1:
        assert both.spearman == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("lacking", [True, False])
def test_other_targets_or_blocks_are_refused_naming_the_module(lacking):
    ours = selection_of(EVERY[:1])
    others = dict(list(GRIDS.items())[:3]) if lacking else GRIDS | {"layers.1.attn.v_proj": BlockGrid(8, 12, 2, 2)}
    theirs = BlockSelection(others, ours.block_indices, 500, SMTConfig())
    for pair in ((ours, theirs), (theirs, ours)):
        with pytest.raises(SMTError, match=r"`layers\.1\.attn\.v_proj` is .*the same targets and grids"):
            Overlap.of(*pair)
