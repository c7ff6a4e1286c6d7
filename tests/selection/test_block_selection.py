"""From scores and a budget to blocks."""

import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import blocks_within, ranked

from smt_trainer import BlockSelection, SMTConfig, SMTError
from smt_trainer.model.base import base_name
from smt_trainer.model.grid import BlockGrid
from smt_trainer.selection.block_selection import SELECTION_FILE
from smt_trainer.selection.choose import select_blocks
from smt_trainer.selection.given import given_selection

GRIDS = {"layers.0.q_proj": BlockGrid(64, 64, 16, 16), "layers.0.v_proj": BlockGrid(32, 64, 16, 16)}


@st.composite
def scored_grids(draw, same_blocks: bool = False):
    """Draw up to three modules with few distinct scores, so that ties are common; not all scores are zero."""
    grids, scores = {}, {}
    for place in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        br, bc = (2, 3) if same_blocks else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        name = f"layers.{place}.q_proj"
        grids[name] = BlockGrid(rows * br, columns * bc, br, bc)
        values = draw(st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns))
        scores[name] = torch.tensor(values, dtype=torch.float32).view(rows, columns) / 4
    assume(any(score.any() for score in scores.values()))
    return scores, grids


def capacity(grids) -> int:
    return sum(grid.num_blocks * grid.block_numel for grid in grids.values())


def chosen(selection: BlockSelection) -> set[tuple[str, int, int]]:
    return {
        (name, row, column) for name, indices in selection.block_indices.items() for row, column in indices.tolist()
    }


@given(scored_grids(), st.data())
def test_a_count_takes_the_best_blocks_of_a_sorted_list_ties_in_order(case, data):
    scores, grids = case
    budget = data.draw(st.integers(1, sum(grid.num_blocks for grid in grids.values())))
    selection = select_blocks(scores, grids, SMTConfig(budget=budget), capacity(grids))
    assert chosen(selection) == set(ranked(scores)[:budget])


@given(scored_grids(), st.floats(0.01, 1.0))
def test_a_fraction_is_met_to_the_nearest_block(case, budget):
    scores, grids = case
    wanted = budget * capacity(grids)
    assume(wanted >= min(grid.block_numel for grid in grids.values()) / 2)
    selection = select_blocks(scores, grids, SMTConfig(budget=budget), capacity(grids))
    ranking = ranked(scores)
    assert chosen(selection) == set(ranking[: blocks_within(ranking, grids, wanted)])


def test_a_fraction_is_met_to_the_nearest_block_beyond_the_integers_of_float32():
    grid = BlockGrid(4097 * 3, 4097, 4097, 4097)
    scores = {"q_proj": torch.tensor([[3.0], [2.0], [1.0]])}
    halfway = 1.5 * grid.block_numel
    for wanted, blocks in ((halfway - 1, 1), (halfway + 1, 2)):
        config = SMTConfig(budget=wanted / 2**30)
        assert select_blocks(scores, {"q_proj": grid}, config, 2**30).num_blocks == blocks


@given(scored_grids(), st.data())
def test_a_count_per_module_takes_the_best_of_each(case, data):
    scores, grids = case
    budget = data.draw(st.integers(1, min(grid.num_blocks for grid in grids.values())))
    config = SMTConfig(budget=budget, scope="per_module")
    best = {block for name in scores for block in ranked({name: scores[name]})[:budget]}
    assert chosen(select_blocks(scores, grids, config, capacity(grids))) == best


@given(scored_grids(same_blocks=True), st.floats(0.01, 1.0))
def test_a_fraction_per_module_is_split_in_proportion_to_size(case, budget):
    scores, grids = case
    blocks = sum(grid.num_blocks for grid in grids.values())
    assume(budget * blocks >= 0.5)
    config = SMTConfig(budget=budget, scope="per_module")
    selection = select_blocks(scores, grids, config, capacity(grids))
    quotas = {name: len(selection.block_indices.get(name, ())) for name in grids}
    assert abs(selection.num_blocks - budget * blocks) <= 0.5
    excess = {name: quotas[name] - budget * grid.num_blocks for name, grid in grids.items()}
    # Largest remainder: no module that was rounded down had a larger remainder than one that was rounded up.
    assert max(excess.values()) - min(excess.values()) <= 1 + 1e-9
    for name in grids:
        assert abs(excess[name]) < 1
        assert {block for block in chosen(selection) if block[0] == name} == set(
            ranked({name: scores[name]})[: quotas[name]]
        )


@given(scored_grids())
def test_block_indices_are_listed_row_by_row(case):
    scores, grids = case
    selection = select_blocks(scores, grids, SMTConfig(budget=1.0), capacity(grids))
    for indices in selection.block_indices.values():
        assert indices.tolist() == sorted(indices.tolist()) and indices.dtype == np.int64


def select(scores=None, num_parameters=100_000, **fields):
    scores = scores or {name: torch.rand(grid.shape) for name, grid in GRIDS.items()}
    return select_blocks(scores, GRIDS, SMTConfig(**fields), num_parameters, "someone/model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_naming_the_module(value):
    scores = {name: torch.ones(grid.shape) for name, grid in GRIDS.items()}
    scores["layers.0.v_proj"][1, 2] = value
    with pytest.raises(SMTError, match=r"scores of `layers\.0\.v_proj` are not finite"):
        select(scores, budget=3)


def test_scores_that_are_all_zero_are_refused():
    with pytest.raises(SMTError, match=r"all scores are zero.*labels are not all -100"):
        select({name: torch.zeros(grid.shape) for name, grid in GRIDS.items()}, budget=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 25}, r"budget=25 blocks is more than the targets hold \(24\).*; 0\.84 % is written 0\.0084\.$"),
        ({"budget": 9, "scope": "per_module"}, r"more than `layers\.0\.v_proj` holds: a weight of 32x64 has 8 blocks"),
        ({"budget": 0.5}, r"more than the targets hold \(6,144 weights, 0\.0614 of the model\).* written 0\.0084\.$"),
        ({"budget": 0.001}, r"100 weights, less than half a block of 256. Use at least 0\.0026"),
    ],
)
def test_a_budget_that_the_targets_cannot_meet_is_refused(fields, message):
    with pytest.raises(SMTError, match=message):
        select(**fields)


def test_both_denominators_are_reported():
    selection = select(budget=6)
    assert selection.trainable_parameters == 6 * 256
    assert selection.fraction_of_model == 6 * 256 / 100_000
    assert selection.fraction_of_targets == 6 / 24
    assert "6 blocks of 16x16 (1,536 parameters): 1.536% of the model, 25.000% of the targets" in selection.summary()
    assert "1 block of 16x16 (256 parameters)" in select(budget=1).summary()


def test_blocks_are_counted_by_projection_empty_ones_included():
    scores = {"layers.0.q_proj": torch.zeros(4, 4), "layers.0.v_proj": torch.ones(2, 4)}
    assert select(scores, budget=5).blocks_by_projection() == {"q_proj": 0, "v_proj": 5}


@pytest.mark.parametrize("fields", [{"budget": 7}, {"budget": 0.01, "scope": "per_module", "score": "random"}])
def test_json_gives_the_same_selection_back(fields, tmp_path):
    selection = select(**fields)
    selection.save(tmp_path / "selection.json")
    for again in (BlockSelection.load(tmp_path / "selection.json"), BlockSelection.resolve(selection.to_dict())):
        assert again.to_dict() == selection.to_dict()
        assert again.grids == selection.grids and again.config == selection.config
        assert chosen(again) == chosen(selection)


def test_resolve_takes_a_selection_a_path_or_a_dictionary(tmp_path):
    selection, file = select(budget=3), tmp_path / SELECTION_FILE
    selection.save(file)
    assert BlockSelection.resolve(selection) is selection
    for given_as in (str(file), file, str(tmp_path), tmp_path, selection.to_dict()):
        assert BlockSelection.resolve(given_as).to_dict() == selection.to_dict()
        assert chosen(given_selection(SMTConfig(selection=given_as), None)) == chosen(selection)


def drop_modules(values):
    del values["modules"]


def newer_format(values):
    values["format"] = 99


def index_out_of_range(values):
    values["modules"]["layers.0.q_proj"]["block_indices"] = [[4, 0]]


def no_blocks(values):
    for module in values["modules"].values():
        module["block_indices"] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_modules, "the selection is damaged"),
        (newer_format, "has format 99"),
        (index_out_of_range, r"block \(4, 0\) was asked for"),
        (no_blocks, "holds no block"),
    ],
)
def test_a_damaged_selection_is_refused(damage, message):
    values = select(budget=3).to_dict()
    damage(values)
    with pytest.raises(SMTError, match=message):
        BlockSelection.from_dict(json.loads(json.dumps(values)))


@pytest.mark.parametrize("text", ["{", "", "[1, 2]"])
def test_a_file_that_holds_no_selection_is_refused(text, tmp_path):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(SMTError, match="selection"):
        BlockSelection.load(tmp_path / "selection.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SMTError, match=r"no selection at .*selection\.json"):
        BlockSelection.load(tmp_path / "selection.json")
    with pytest.raises(SMTError, match=rf"no selection at {tmp_path / SELECTION_FILE}: expected a JSON file"):
        BlockSelection.load(tmp_path)


def test_a_local_base_is_recorded_by_its_folder_alone(base):
    from transformers import AutoModelForCausalLM

    assert base_name(AutoModelForCausalLM.from_pretrained(base)) == "base"
    assert base_name(tiny.llama()) is None


@given(st.permutations([(0, 0), (0, 3), (1, 1), (2, 0)]))
def test_blocks_may_be_given_in_any_order_and_are_kept_row_by_row(places):
    given = {"layers.0.q_proj": torch.tensor(places, dtype=torch.int32)}
    kept = BlockSelection(GRIDS, given, 10_000, SMTConfig()).block_indices["layers.0.q_proj"]
    assert kept.dtype == np.int64 and kept.tolist() == sorted(map(list, places))
