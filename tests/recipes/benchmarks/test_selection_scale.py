"""The scale benchmark, on tiny models."""

import json

from recipes.benchmarks.parts.models import MODELS, tiny
from recipes.benchmarks.parts.selection import CUTS
from recipes.benchmarks.selection_scale import markdown, measure


def test_a_measurement_has_a_row_for_each_case_and_a_table_of_it():
    results = measure({"tiny": tiny(3), "larger": tiny(6)}, layers=[1, 2], rounds=1)
    results = json.loads(json.dumps(results))
    cases = [(row["model"], row["cut"], row["targets"], row["blocks"]) for row in results["selection"]]
    # Hidden size 64, one key and value head per two query heads, an MLP of 96; 32 divides all.
    linears = 2 * 64 + 2 * 32 + 2 * 96 + 64
    assert cases == [
        (name, cut, layers * targets, layers * blocks)
        for name, layers in (("tiny", 3), ("larger", 6))
        for cut, targets, blocks in zip(CUTS, (3, 7, 7), (8, 30, linears), strict=True)
    ]
    for row in results["selection"]:
        assert row["peak_bytes"] >= 0 and row["json_bytes"] > 0
        assert all(value > 0 for name, value in row.items() if name.endswith("_seconds"))
        assert row["grad_signed_bytes"] == 4 * row["blocks"] < row["grad_l1_bytes"]
    assert [row["targets"] for row in results["warmup"]] == [3, 6]
    tables = markdown(results)
    assert tables.count("| tiny |") == tables.count("| larger |") == 2 * len(CUTS)
    assert all(results[name] in tables for name in ("hardware", "command"))


def test_the_largest_grid_is_that_of_llama_405b():
    layers, hidden, heads, kv_heads, *_ = MODELS["Llama-3.1-405B"]
    assert (layers, hidden, hidden // heads, kv_heads) == (126, 16384, 128, 8)
