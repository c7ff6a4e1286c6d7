"""Blocks under a cap on the rank of a module's change."""

from itertools import combinations

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from smt_trainer import BlockScores, SMTConfig, SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.selection.budget import check_budget_fits
from smt_trainer.selection.choose import select_blocks
from smt_trainer.selection.rank import best_lines

NAMES = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in ("self_attn.q_proj", "mlp.up_proj")]
PARAMETERS = 10_000


@st.composite
def scored(draw, same_size: bool = True):
    """Draw four linears in two layers with few distinct scores, not all zero."""
    grids, scores = {}, {}
    for name in NAMES:
        rows, columns = draw(st.integers(2, 4)), draw(st.integers(2, 5))
        br, bc = (2, 3) if same_size else draw(st.sampled_from([(2, 3), (1, 5), (4, 4)]))
        grids[name] = BlockGrid(rows * br, columns * bc, br, bc)
        values = draw(
            st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 21]), min_size=rows * columns, max_size=rows * columns)
        )
        scores[name] = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    return scores, grids


def ranks(selection) -> list[int]:
    """The rows or columns of each module that its blocks touch, whichever are fewer, block by block."""
    found = []
    for name, indices in selection.block_indices.items():
        rows, columns = (len(set(lines.tolist())) for lines in indices.T)
        br, bc = selection.grids[name].block_shape
        found.append(min(rows * br, columns * bc))
    return found


def chosen(selection) -> list[tuple[str, int, int]]:
    return [(name, *index) for name, indices in selection.block_indices.items() for index in indices.tolist()]


def total(selection, scores) -> float:
    return sum(scores[name][row, column].item() for name, row, column in chosen(selection))


def weights(selection) -> int:
    return sum(selection.grids[name].block_numel for name, _, _ in chosen(selection))


@st.composite
def configured(draw):
    """Draw a budget and the caps, with every scope and with groups."""
    scope = draw(st.sampled_from(["global", "per_module"]))
    amount = st.integers(1, 3) if scope == "per_module" else st.integers(4, 16)
    amount |= st.floats(0.1, 0.6)
    budget = draw(st.one_of(amount, st.fixed_dictionaries({"attention": amount, "mlp": amount})))
    layer_cap = draw(st.sampled_from([None, None, 9, 0.6]))
    rank_cap = draw(st.integers(2, 7))
    return SMTConfig(budget=budget, budget_of="targets", scope=scope, layer_cap=layer_cap, rank_cap=rank_cap)


@given(scored(), configured())
def test_the_cap_holds_and_the_budget_is_met_or_refused_with_a_reason(case, config):
    scores, grids = case
    try:
        selection = select_blocks(scores, grids, config, PARAMETERS)
    except SMTError as error:
        reasons = ("more than the targets hold", "is more than `", "is less than either edge", "less than half a block")
        assert any(reason in str(error) for reason in (*reasons, "allows. Lower the budget or raise layer_cap"))
        return
    assert max(ranks(selection)) <= config.rank_cap
    freely = select_blocks(scores, grids, SMTConfig(**config.to_dict() | {"rank_cap": None}), PARAMETERS)
    assert selection.num_blocks == freely.num_blocks
    assert total(selection, scores) <= total(freely, scores)
    if max(ranks(freely)) <= config.rank_cap:
        assert chosen(selection) == chosen(freely)


@given(scored(same_size=False), st.floats(0.1, 0.6), st.integers(2, 7), st.sampled_from([None, 9, 0.6]))
def test_with_blocks_of_several_sizes_the_cap_holds_and_the_budget_is_met(case, budget, rank_cap, layer_cap):
    scores, grids = case
    config = SMTConfig(budget=budget, budget_of="targets", rank_cap=rank_cap, layer_cap=layer_cap)
    try:
        selection = select_blocks(scores, grids, config, PARAMETERS)
    except SMTError as error:
        assert str(error)
        return
    assert max(ranks(selection)) <= rank_cap
    wanted = budget * sum(grid.num_blocks * grid.block_numel for grid in grids.values())
    largest = max(grid.block_numel for grid in grids.values())
    assert abs(weights(selection) - wanted) <= largest / 2 or selection.num_blocks == 1


@given(scored(), st.data())
def test_what_the_targets_hold_under_the_cap_is_chosen_and_one_block_more_is_refused(case, data):
    scores, grids = case
    rank_cap = data.draw(st.integers(2, 10))
    room = 0
    for grid in grids.values():
        (rows, columns), (br, bc) = grid.shape, grid.block_shape
        room += max(min(rows, rank_cap // br) * columns, min(columns, rank_cap // bc) * rows)
    selection = select_blocks(scores, grids, SMTConfig(budget=room, rank_cap=rank_cap), PARAMETERS)
    assert selection.num_blocks == room and max(ranks(selection)) <= rank_cap
    with pytest.raises(SMTError, match=rf"more than the targets hold under rank_cap={rank_cap} \({room}\)"):
        check_budget_fits(grids, SMTConfig(budget=room + 1, rank_cap=rank_cap), PARAMETERS)


@given(scored(), st.integers(1, 12))
def test_a_cap_that_no_module_reaches_changes_nothing(case, budget):
    scores, grids = case
    assume(budget <= sum(grid.num_blocks for grid in grids.values()))
    freely = select_blocks(scores, grids, SMTConfig(budget=budget), PARAMETERS)
    for rank_cap in (max(ranks(freely)), 1000):
        capped = select_blocks(scores, grids, SMTConfig(budget=budget, rank_cap=rank_cap), PARAMETERS)
        assert chosen(capped) == chosen(freely)


def best_within(scores, grids, rank_cap: int, budget: int) -> float:
    """The highest sum of scores of `budget` blocks of two modules under the cap, by trying all lines of each."""
    kept = []
    for name, score in scores.items():
        options = []
        for matrix, edge in ((score, grids[name].block_rows), (score.T, grids[name].block_columns)):
            count = min(len(matrix), rank_cap // edge)
            options += [matrix[list(lines)].flatten() for lines in combinations(range(len(matrix)), count)]
        kept.append(options)
    first, second = kept
    both = (torch.cat([one, other]) for one in first for other in second)
    return max(blocks.topk(budget).values.sum().item() for blocks in both if len(blocks) >= budget)


@given(st.integers(0, 1000), st.floats(-1.0, 1.0), st.integers(2, 8))
def test_at_a_price_the_kept_lines_have_the_largest_excess_of_all(seed, price, rank_cap):
    score, grid = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).double(), BlockGrid(8, 15, 2, 3)
    mask = best_lines(score, grid, rank_cap, price)
    excess, best = (score - price).clamp(min=0), 0.0
    for matrix, edge in ((excess, 2), (excess.T, 3)):
        count = min(len(matrix), rank_cap // edge)
        best = max(best, *(matrix[list(lines)].sum().item() for lines in combinations(range(len(matrix)), count)))
    assert excess[mask].sum().item() == pytest.approx(best)


def test_the_choices_come_within_half_a_percent_of_the_best_that_the_cap_allows():
    """Most are the best. At some budgets no price parts the lines: the duality gap."""
    found, best = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        grids = {name: BlockGrid(10, 15, 2, 3) for name in NAMES[:2]}
        scores = {name: torch.rand(5, 5, generator=generator) ** 4 for name in grids}
        for budget in (1, 5, 12, 20):
            config = SMTConfig(budget=budget, rank_cap=6)
            found.append(total(select_blocks(scores, grids, config, PARAMETERS), scores))
            best.append(best_within(scores, grids, 6, budget))
    assert sum(found) > 0.995 * sum(best)
    assert sum(ours == pytest.approx(theirs) for ours, theirs in zip(found, best, strict=True)) > 0.9 * len(best)


@pytest.mark.parametrize("scope", ["global", "per_module"])
def test_the_choice_beats_random_lines_under_the_same_cap(scope, warnings):
    generator = torch.Generator().manual_seed(0)
    grids = dict.fromkeys(NAMES, BlockGrid(16, 16, 2, 2))
    config = SMTConfig(budget=10 if scope == "per_module" else 40, rank_cap=4, scope=scope)
    scores = {name: torch.rand(8, 8, generator=generator) for name in NAMES}
    found = total(select_blocks(scores, grids, config, PARAMETERS), scores)
    assert len(warnings()) == 1
    for _ in range(20):
        noise = {name: torch.rand(8, 8, generator=generator) for name in NAMES}
        assert total(select_blocks(noise, grids, config, PARAMETERS), scores) < found


def test_one_strong_block_does_not_take_a_line_from_many_that_the_budget_pays_for():
    """Nor do many weak ones, which it does not pay for."""
    score = torch.full((3, 8), 0.0)
    score[0, 0], score[1, :4], score[2] = 5.0, 3.0, 0.9
    grids = {NAMES[0]: BlockGrid(3, 16, 1, 2)}
    choice = {
        budget: chosen(select_blocks({NAMES[0]: score}, grids, SMTConfig(budget=budget, rank_cap=1), PARAMETERS))
        for budget in (1, 4, 8)
    }
    assert {budget: {row for _, row, _ in blocks} for budget, blocks in choice.items()} == {1: {0}, 4: {1}, 8: {1}}


def test_the_cost_of_the_cap_is_told(warnings):
    grids = {NAMES[0]: BlockGrid(4, 4, 2, 2)}
    scores = {NAMES[0]: torch.tensor([[4.0, 1.0], [2.0, 3.0]])}
    select_blocks(scores, grids, SMTConfig(budget=2, rank_cap=4), PARAMETERS)
    assert not warnings()
    select_blocks(scores, grids, SMTConfig(budget=2, rank_cap=3), PARAMETERS)
    assert warnings() == ["rank_cap=3 costs 14% of the scores: the chosen blocks sum to 6, the best without it to 7."]


def test_a_cap_below_the_edges_of_a_block_is_refused():
    grids = dict.fromkeys(NAMES, BlockGrid(512, 512, 256, 256))
    with pytest.raises(
        SMTError, match=r"rank_cap=64 is less than either edge of a block \(256x256\).*smaller block_size"
    ):
        check_budget_fits(grids, SMTConfig(budget=1, rank_cap=64), 10**7)


def test_a_quota_above_what_a_module_holds_under_the_cap_is_refused_naming_both():
    grids = dict.fromkeys(NAMES, BlockGrid(8, 8, 2, 2))
    expected = r"budget=5 blocks of each module .* has 4 blocks under rank_cap=2\. Lower the budget, raise rank_cap or"
    with pytest.raises(SMTError, match=expected):
        check_budget_fits(grids, SMTConfig(budget=5, scope="per_module", rank_cap=2), PARAMETERS)


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_rows_and_columns_are_capped_by_their_number(granularity):
    model = tiny.llama()
    capped = tiny.choose(model, SMTConfig(score="random", granularity=granularity, budget=24, rank_cap=5))
    assert capped.num_blocks == 24 and max(len(indices) for indices in capped.block_indices.values()) == 5


def test_saved_scores_give_choices_under_any_cap(tmp_path):
    model = tiny.llama()
    BlockScores.of(model, tiny.config(), [tiny.batch()] * 2).save(tmp_path / "scores.safetensors")
    scores = BlockScores.load(tmp_path / "scores.safetensors")
    capped = scores.select(tiny.config(budget=24, rank_cap=16))
    assert capped.num_blocks == 24 and max(ranks(capped)) == 16 and capped.config.rank_cap == 16


def test_dependent_columns_are_under_no_cap():
    with pytest.raises(SMTError, match=r"rank_cap=8 cannot hold for columns that depend on rows"):
        SMTConfig(granularity="row", train_dependents=True, rank_cap=8)
