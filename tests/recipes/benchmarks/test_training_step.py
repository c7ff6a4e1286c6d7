"""The benchmark of a training step, on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.benchmarks import training_step
from recipes.benchmarks.parts.memory import account
from recipes.benchmarks.parts.methods import FLOOR, FULL, METHODS, ROWS, SECOND_FLOOR, SMT, Variant
from recipes.benchmarks.parts.models import Mixture, tiny
from recipes.benchmarks.parts.setting import SHAPES, Setting
from recipes.benchmarks.parts.timing import Seconds, ratios
from recipes.benchmarks.parts.training import Training, copy_for

# Hidden size 64, one key and value head per two query heads: q is 64x64, k and v are 32x64; 32 divides all.
LAYERS = 8
SETTING = Setting(tiny(LAYERS), batch=1, length=8)
# Parameters that a method adds in one step of its size: a rank, a row, a block or an entry of a weight.
STEPS = dict.fromkeys(("LoRA", "rsLoRA", "DoRA", "SHiRA"), LAYERS * (128 + 96 + 96))
STEPS |= {"MiSS": LAYERS * 128, "WaveFT": LAYERS * 3, "Super-Tuning": LAYERS * 3 * 2, ROWS: 64, SMT: 32 * 32}
BUDGETS = (0.05,)
GROWTH = (0.02, 0.05)


@pytest.fixture(scope="module")
def model():
    return SETTING.build()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", SETTING.shape)
        patch.setattr(training_step, "GROWTH", GROWTH)
        words = ["--shape", "tiny", "llama-2-7b", "--rounds", "1", "--curve-rounds", "1", "--batch", "1"]
        patch.setattr(torch.cuda, "is_available", lambda: False)
        training_step.main([*words, "--length", "8", "--budgets", *map(str, BUDGETS), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(files):
    return json.loads((files / "step-tiny-fp32.json").read_text())


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_there_are_three_files_of_the_shape_and_none_of_one_that_needs_a_gpu(files):
    assert {path.name for path in files.iterdir()} == {f"step-tiny-fp32.{ending}" for ending in ("json", "md", "png")}


def test_every_method_and_budget_has_every_figure(results):
    rows = {(row["method"], row["budget"]): row for row in results["methods"]}
    expected = {(method, None) for method in (FLOOR, SECOND_FLOOR, FULL)}
    expected |= {(method, budget) for method in METHODS if method != FULL for budget in BUDGETS}
    assert set(rows) == expected and len(rows) == len(results["methods"])
    assert all(value is not None for row in rows.values() for name, value in row.items() if name != "budget")
    for (method, _), row in rows.items():
        assert row["flops"] > 0 < row["saved_bytes"] < row["live_bytes"]
        frozen = method in (FLOOR, SECOND_FLOOR)
        assert row["gradient_bytes"] == 4 * row["trainable"] and (row["trainable"] == 0) == frozen
        assert row["optimizer_bytes"] == 2 * row["gradient_bytes"]
    others = {(row["method"], row["budget"]) for row in results["smt_to_others"]}
    assert others == {(method, budget) for method in METHODS if method != SMT for budget in BUDGETS}
    assert [row["budget"] for row in results["curves"]["by_budget"]] == list(GROWTH)
    assert [row["lowest_layer"] for row in results["curves"]["by_lowest_layer"]] == [0, 2, 4, 6, 7]


def test_the_tables_name_every_method_and_where_the_figures_come_from(files, results):
    tables = (files / "step-tiny-fp32.md").read_text()
    assert all(f"| {row['method']} |" in tables for row in results["methods"])
    assert all(results[name] in tables for name in ("hardware", "command"))


def test_every_method_trains_as_many_parameters_as_its_ranks_allow(results):
    total = results["parameters"]
    for row in results["methods"]:
        if row["method"] in STEPS:
            assert abs(row["trainable"] - row["budget"] * total) <= STEPS[row["method"]] / 2, row["method"]
        else:
            assert row["trainable"] == (total if row["method"] == FULL else 0)


def test_the_ratios_are_those_of_one_round(results):
    floors = results["methods"][:2]
    for row in results["methods"]:
        for timer in ("processor", "clock"):
            (mine,) = row["rounds"]
            mean = sum(floor["rounds"][0][timer] for floor in floors) / 2
            assert row["to_floor"][timer]["median"] == pytest.approx(mine[timer] / mean)
            assert row["seconds"][timer]["median"] == mine[timer]


def test_a_ratio_is_taken_within_each_round_before_the_quartiles():
    floor, second, smt = Variant(FLOOR), Variant(SECOND_FLOOR), Variant(SMT, 0.02)
    rounds = [
        {floor: Seconds(0.5, 10), second: Seconds(1.5, 10), smt: Seconds(3, 10)},
        {floor: Seconds(4, 15), second: Seconds(4, 25), smt: Seconds(4, 10)},
    ]
    assert ratios(rounds, smt, [floor, second]) == {
        timer: dict(zip(("lower", "median", "upper"), np.quantile(each, (0.25, 0.5, 0.75)), strict=True))
        for timer, each in {"processor": (3, 1), "clock": (1, 0.5)}.items()
    }


def test_the_parts_of_smt_are_parts_of_its_step(results):
    for row in [*results["methods"], *results["curves"]["by_budget"]]:
        assert ("own_work" in row) == (row["method"] == SMT)
        if row["method"] == SMT:
            shares = [part["clock"]["median"] for part in row["own_work"].values()]
            assert len(shares) == 4 and all(share > 0 for share in shares) and sum(shares) < 1


@pytest.mark.parametrize("method", [SMT, ROWS])
def test_only_chosen_blocks_change(model, method):
    variant = Variant(method, 0.05)
    training = Training(copy_for(variant, model), variant, SETTING)
    training.step(SETTING.tokens())
    selection, base = training.model.smt_state.selection, weights(model)
    for name, parameter in weights(training.model).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "blocks":
            continue
        expected = base[name].clone()
        if leaf == "weight" and module in selection.block_indices:
            layer = training.model.get_submodule(module)
            layer.grid.scatter_(expected, layer.block_indices, layer.blocks.detach())
            assert not torch.equal(expected, base[name])
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("method", [FLOOR, *METHODS])
def test_no_method_changes_the_model_that_it_shares_weights_with(model, method):
    before = weights(model)
    variant = Variant(method, None if method in (FLOOR, FULL) else 0.05)
    training = Training(copy_for(variant, model), variant, SETTING)
    loss = training.loss(SETTING.tokens()).item()
    training.step(SETTING.tokens())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert (training.loss(SETTING.tokens()).item() < loss) == (method != FLOOR)


@pytest.mark.parametrize("method", [FLOOR, FULL, "LoRA", SMT])
def test_a_loss_in_chunks_is_the_loss_and_has_its_gradients(model, method):
    variant = Variant(method, None if method in (FLOOR, FULL) else 0.05)
    found = []
    for chunked_loss in (False, True):
        setting = replace(SETTING, chunked_loss=chunked_loss)
        torch.manual_seed(0)
        training = Training(copy_for(variant, model), variant, setting)
        loss = training.loss(setting.tokens())
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in training.parameters]))
    torch.testing.assert_close(*found)


def test_full_fine_tuning_saves_and_computes_more_than_smt_and_smt_about_what_the_floor_does(model):
    counts = {}
    for variant in (Variant(FLOOR), Variant(FULL), Variant(SMT, 0.02)):
        counts[variant.method] = account(Training(copy_for(variant, model), variant, SETTING), SETTING.tokens())
    for what in ("flops", "saved_bytes", "live_bytes"):
        assert counts[FLOOR][what] * 0.9 < counts[SMT][what] < counts[FULL][what]
    assert counts[SMT]["flops"] < 1.1 * counts[FLOOR]["flops"]


def test_experts_are_measured_beside_what_can_train_them(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "qwen3-moe", Mixture(2, 64, 4, 2, 16, 32, 8, 2, 64))
    options = ["--shape", "qwen3-moe", "--rounds", "1", "--curve-rounds", "0", "--batch", "1", "--length", "8"]
    training_step.main(["--output", str(tmp_path), *options, "--budgets", "0.05"])
    results = json.loads((tmp_path / "step-qwen3-moe-fp32.json").read_text())
    rows = {row["method"]: row for row in results["methods"]}
    assert list(rows) == [FLOOR, SECOND_FLOOR, FULL, "LoRA", ROWS, SMT]
    for method in ("LoRA", ROWS, SMT):
        assert rows[method]["trainable"] == pytest.approx(0.05 * results["parameters"], rel=0.1)
    assert rows[SMT]["saved_bytes"] < rows["LoRA"]["saved_bytes"]
    assert "All methods train the matrices of the experts" in (tmp_path / "step-qwen3-moe-fp32.md").read_text()
