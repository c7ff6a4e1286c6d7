"""Budgets: by group, of the targets, under a cap for each layer; and the papers' counts."""

from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import blocks_within, ranked, under_cap
from transformers import LlamaConfig, LlamaForCausalLM

from smt_trainer import BlockSelection, SMTConfig, SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import layer_path
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.selection.budget import check_budget_fits
from smt_trainer.selection.choose import select_blocks

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
NAMES = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]
PARAMETERS = 10_000


@st.composite
def scored(draw, same_size: bool = True):
    """Draw six linears in two layers with few distinct scores, not all zero; their block counts differ."""
    grids, scores = {}, {}
    for name in NAMES:
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        br, bc = (2, 3) if same_size else draw(st.sampled_from([(2, 3), (1, 5), (4, 4)]))
        grids[name] = BlockGrid(rows * br, columns * bc, br, bc)
        values = draw(st.lists(st.integers(1, 4), min_size=rows * columns, max_size=rows * columns))
        scores[name] = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    return scores, grids


def numel(grids) -> int:
    return sum(grid.num_blocks * grid.block_numel for grid in grids.values())


def chosen(selection: BlockSelection) -> list[tuple[str, int, int]]:
    return [(name, *index) for name, indices in selection.block_indices.items() for index in indices.tolist()]


def part(items: dict, key: str) -> dict:
    return {name: item for name, item in items.items() if key in name}


# ---- groups ----


@given(scored(), st.data())
def test_groups_choose_as_if_each_were_alone_with_its_budget(case, data):
    scores, grids = case
    budgets = {
        "attention": data.draw(st.integers(1, sum(grid.num_blocks for grid in part(grids, "attn").values()))),
        "mlp": data.draw(st.floats(6 / PARAMETERS, numel(part(grids, "mlp")) / PARAMETERS)),
    }
    scope = data.draw(st.sampled_from(["global", "per_module"]))
    if scope == "per_module":
        budgets["attention"] = 1
    together = select_blocks(scores, grids, SMTConfig(budget=budgets, scope=scope), PARAMETERS)
    apart = []
    for key, group in (("attn", "attention"), ("mlp", "mlp")):
        config = SMTConfig(budget=budgets[group], scope=scope)
        apart += chosen(select_blocks(part(scores, key), part(grids, key), config, PARAMETERS))
    assert sorted(chosen(together)) == sorted(apart)
    assert list(together.block_indices) == [name for name in NAMES if name in together.block_indices]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"attention": 1}, r"exactly one group of the budget \(attention\): `model\.layers\.0\.mlp\.up_proj` to none"),
        ({"attention": 1, "mlp": 1, "q_proj": 1}, r"`model\.layers\.0\.self_attn\.q_proj` to attention and q_proj"),
        ({"attention": 1, "mlp": 1, "o_proj": 1}, r"a group 'o_proj', but none of the 6 targets"),
        ({"attention": 99, "mlp": 1}, r"budget\['attention'\]=99 blocks is more than the targets hold \(16\)"),
        ({"attention": 1, "mlp": 0.9}, r"budget\['mlp'\]=0\.9 of 10,000 parameters is more than the targets hold"),
    ],
)
def test_groups_that_do_not_divide_the_targets_or_hold_too_little_are_refused(budget, message):
    grids = dict.fromkeys(NAMES, BlockGrid(8, 8, 4, 4))
    with pytest.raises(SMTError, match=message):
        check_budget_fits(grids, SMTConfig(target_modules="all-linear", budget=budget), PARAMETERS)


def test_scores_that_are_all_zero_in_one_group_are_refused_naming_it():
    grids = dict.fromkeys(NAMES, BlockGrid(8, 8, 4, 4))
    scores = {name: torch.full((2, 2), float("attn" in name)) for name in NAMES}
    with pytest.raises(SMTError, match=r"all scores are zero for budget\['mlp'\]=2"):
        select_blocks(scores, grids, SMTConfig(budget={"attention": 2, "mlp": 2}), PARAMETERS)


# ---- of the targets ----


@given(scored(same_size=False), st.floats(0.1, 1.0))
def test_a_fraction_of_the_targets_is_one_of_the_model_with_the_other_denominator(case, budget):
    scores, grids = case
    of_targets = select_blocks(scores, grids, SMTConfig(budget=budget, budget_of="targets"), PARAMETERS)
    of_model = select_blocks(scores, grids, SMTConfig(budget=budget), numel(grids))
    assert chosen(of_targets) == chosen(of_model)


def test_all_of_the_targets_is_every_block():
    grids = dict.fromkeys(NAMES, BlockGrid(8, 8, 4, 4))
    scores = {name: torch.rand(2, 2) for name in NAMES}
    for scope in ("global", "per_module"):
        config = SMTConfig(budget=1.0, budget_of="targets", scope=scope)
        assert select_blocks(scores, grids, config, PARAMETERS).num_blocks == 24


# ---- a cap for each layer ----


@given(scored(), st.data())
def test_under_a_cap_each_layer_gives_its_best_and_the_best_of_these_are_chosen(case, data):
    scores, grids = case
    cap = data.draw(st.one_of(st.integers(1, 12), st.floats(0.3, 1.0)))
    layer_of = {name: layer_path(name) for name in grids}
    allowed = under_cap(ranked(scores), grids, layer_of, cap)
    assume(allowed)
    count = data.draw(st.integers(1, len(allowed)))
    config = SMTConfig(budget=count, layer_cap=cap)
    assert set(chosen(select_blocks(scores, grids, config, PARAMETERS))) == set(allowed[:count])
    with pytest.raises(SMTError, match=f"more than the targets hold under layer_cap={cap} \\({len(allowed)}\\)"):
        check_budget_fits(grids, SMTConfig(budget=len(allowed) + 1, layer_cap=cap), PARAMETERS)


@given(scored(same_size=False), st.one_of(st.integers(1, 12), st.floats(0.3, 1.0)), st.floats(0.05, 1.0))
def test_with_blocks_of_several_sizes_the_cap_holds_and_a_larger_budget_is_refused(case, cap, budget):
    scores, grids = case
    config = SMTConfig(budget=budget, budget_of="targets", layer_cap=cap)
    allowed = under_cap(ranked(scores), grids, {name: layer_path(name) for name in grids}, cap)
    room = sum(grids[name].block_numel for name, _, _ in allowed)
    wanted = budget * numel(grids)
    assume(wanted >= min(grid.block_numel for grid in grids.values()) / 2)
    if not allowed or wanted > room + max(grid.block_numel for grid in grids.values()) / 2:
        with pytest.raises(SMTError, match=f"more than the targets hold under layer_cap={cap}"):
            select_blocks(scores, grids, config, PARAMETERS)
        return
    selection = select_blocks(scores, grids, config, PARAMETERS)
    assert set(chosen(selection)) == set(allowed[: blocks_within(allowed, grids, wanted)])


def test_a_decimal_cap_is_met_exactly():
    grids = {"layers.0.q_proj": BlockGrid(100, 1, 1, 1)}
    assert 0.29 * 100 < 29
    check_budget_fits(grids, SMTConfig(budget=29, layer_cap=0.29), PARAMETERS)


def test_a_cap_below_the_quotas_of_the_modules_is_refused_naming_the_layer():
    grids = dict.fromkeys(NAMES, BlockGrid(8, 8, 4, 4))
    config = SMTConfig(budget=2, scope="per_module", layer_cap=5)
    with pytest.raises(SMTError, match=r"takes 6 blocks of `model\.layers\.0`, more than layer_cap=5 allows"):
        check_budget_fits(grids, config, PARAMETERS)
    check_budget_fits(grids, SMTConfig(budget=2, scope="per_module", layer_cap=6), PARAMETERS)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.self_attn.q_proj", "model.layers.7"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0"),
        ("lm_head", ""),
    ],
)
def test_a_layer_is_named_by_the_path_up_to_its_number(name, layer):
    assert layer_path(name) == layer


# ---- the papers' counts, on models without weights ----

SHAPES = {
    "LLaMA-7B": (32, 4096, 32, 32, 11008, 32000),
    "LLaMA-13B": (40, 5120, 40, 40, 13824, 32000),
    "Llama-3-8B": (32, 4096, 32, 8, 14336, 128256),
}
FIELDS = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
QKV, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]


@cache
def model(name: str) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**dict(zip(FIELDS, SHAPES[name], strict=True))))


def select(name: str, **fields) -> BlockSelection:
    config = SMTConfig(score="random", **fields)
    targets = find_targets(model(name), config)
    grids = target_grids(targets, config)
    scores = make_scorer(targets, grids, config).scores()
    return select_blocks(scores, grids, config, count_parameters(model(name)))


@pytest.mark.parametrize(
    ("name", "percent", "blocks"),
    [
        ("LLaMA-7B", 0.43, 442),
        ("LLaMA-7B", 0.84, 864),
        ("LLaMA-7B", 0.86, 884),
        ("LLaMA-7B", 1.26, 1296),
        ("LLaMA-7B", 2.50, 2571),
        ("LLaMA-7B", 3.73, 3835),
        ("LLaMA-7B", 4.91, 5048),
        ("LLaMA-13B", 0.68, 1351),
        ("LLaMA-13B", 4.91, 9752),
        ("Llama-3-8B", 0.71, 870),
        ("Llama-3-8B", 3.01, 3688),
    ],
)
def test_the_percentages_of_smts_tables_give_their_block_counts(name, percent, blocks):
    selection = select(name, budget=percent / 100)
    assert selection.num_blocks == blocks
    assert {grid.block_shape for grid in selection.grids.values()} == {(256, 256)}


@pytest.mark.parametrize(("mlp", "attention"), [(0, 884), (442, 442), (221, 663), (884, 0)])
def test_the_splits_of_smt_in_its_table_4(mlp, attention):
    budget = {group: count for group, count in {"mlp": mlp, "attention": attention}.items() if count}
    targets = (MLP if mlp else []) + (QKV if attention else [])
    counts = select("LLaMA-7B", target_modules=targets, budget=budget).blocks_by_projection()
    assert sum(counts.get(leaf, 0) for leaf in MLP) == mlp
    assert sum(counts.get(leaf, 0) for leaf in QKV) == attention


def test_table_4_in_fractions_is_met_by_each_group():
    selection = select("LLaMA-7B", target_modules=QKV + MLP, budget={"attention": 0.0043, "mlp": 0.0043})
    counts = selection.blocks_by_projection()
    assert [sum(counts[leaf] for leaf in leaves) for leaves in (QKV, MLP)] == [442, 442]


@pytest.mark.parametrize("leaf", QKV)
def test_one_projection_alone_as_in_smts_table_6(leaf):
    assert select("LLaMA-7B", target_modules=[leaf], budget={leaf: 0.0086}).blocks_by_projection() == {leaf: 884}


@pytest.mark.parametrize(
    ("name", "targets", "rows", "millions"),
    [
        ("LLaMA-7B", "all-linear", 32, 36.4),
        ("LLaMA-7B", "all-linear", 64, 72.9),
        ("LLaMA-7B", "all-linear", 128, 145.8),
        ("LLaMA-7B", "mlp", 32, 19.7),
        ("LLaMA-7B", "mlp", 64, 39.3),
        ("LLaMA-7B", "mlp", 128, 78.6),
        ("Llama-3-8B", "all-linear", 32, 39.8),
        ("Llama-3-8B", "all-linear", 64, 79.7),
        ("Llama-3-8B", "all-linear", 128, 159.4),
        ("Llama-3-8B", "mlp", 32, 23.1),
        ("Llama-3-8B", "mlp", 64, 46.1),
        ("Llama-3-8B", "mlp", 128, 92.3),
    ],
)
def test_the_trainable_parameters_of_spsft_in_its_tables_7_and_8(name, targets, rows, millions):
    selection = select(name, target_modules=targets, granularity="row", scope="per_module", budget=rows)
    assert selection.trainable_parameters / 1e6 == pytest.approx(millions, abs=0.0501)
    assert {len(indices) for indices in selection.block_indices.values()} == {rows}
    assert len(selection.grids) == 32 * (7 if targets == "all-linear" else 3)


def test_more_rows_than_a_module_has_are_refused_naming_it_and_its_size():
    expected = r"budget=2000 rows of each module is more than `model\.layers\.0\.self_attn\.k_proj` holds: .* 1024 rows"
    with pytest.raises(SMTError, match=expected):
        select("Llama-3-8B", target_modules="all-linear", granularity="row", scope="per_module", budget=2000)
