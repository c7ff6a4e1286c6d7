"""The benchmark of a warm-up step, on a tiny model."""

import json

import pytest

from recipes.benchmarks import warmup
from recipes.benchmarks.parts.methods import FLOOR, SMT
from recipes.benchmarks.parts.models import MODELS, tiny
from smt_trainer.config import SCORES

LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, warmup.SHAPE, tiny(LAYERS))
        warmup.main(["--output", str(folder), "--rounds", "2", "--batch", "2", "--length", "8"])
    return folder


def test_every_step_has_every_figure(folder):
    results = json.loads((folder / "warmup.json").read_text())
    rows = {row["step"]: row for row in results["steps"]}
    assert list(rows) == [FLOOR, SMT, warmup.LORA, *SCORES[:-2]]
    for row in rows.values():
        assert row["peak_bytes"] >= 0 and len(row["rounds"]) == 2
        for other, ratio in row["to"].items():
            pairs = zip(row["rounds"], rows[other]["rounds"], strict=True)
            expected = sum(mine["processor"] / its["processor"] for mine, its in pairs) / 2
            assert ratio["processor"]["median"] == pytest.approx(expected)
    # Hidden size 64, one key and value head per two query heads; 8 blocks of 32x32.
    sizes = {score: rows[score]["accumulator_bytes"] for score in SCORES[:-2]}
    assert sizes["grad_l1"] == sizes["grad_l2"] == 4 * LAYERS * 8 * 32 * 32
    assert sizes["grad_signed"] == sizes["grad_abs"] == sizes["taylor"] == 4 * LAYERS * 8
    # Two examples, two classes, and the number of examples in each.
    assert sizes["qm_taylor"] == 2 * 4 * LAYERS * 8 + 2 * 8
    tables = (folder / "warmup.md").read_text()
    assert all(f"| {name} |" in tables for name in rows) and results["hardware"] in tables


def test_lora_has_rank_8(folder):
    results = json.loads((folder / "warmup.json").read_text())
    setting = warmup.Setting(tiny(LAYERS))
    assert results["setting"]["shape"] == setting.to_dict()["shape"]
    model = setting.build()
    budget = warmup._budget_of_rank(setting, 8)
    trained = warmup.Variant("LoRA", budget).make_trainable(model, 0, "qkv")
    ranks = {parameter.shape[0] for name, parameter in trained.named_parameters() if "lora_A" in name}
    assert ranks == {8}
