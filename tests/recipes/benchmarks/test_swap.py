"""The benchmark of changing a delta in memory, on a tiny model; and its committed result."""

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")
from recipes.benchmarks.parts.models import tiny
from recipes.benchmarks.swap import markdown, measure

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


def test_a_measurement_has_a_time_of_each_action_and_a_table_of_it():
    results = json.loads(json.dumps(measure(tiny(2), (0.05, 0.1), rounds=2)))
    assert [one["budget"] for one in results["budgets"]] == [0.05, 0.1]
    for one in results["budgets"]:
        assert one["to_base"]["the base"]["median"] == 1
        assert one["swapped_weights"] > 0 and one["adapter_weights"] > 0
        milliseconds = 1000 * one["seconds"]["swap"]["median"]
        assert f"| `swap` | {one['swapped_weights']:,} | {milliseconds:.3f} (" in markdown(results)


def test_the_committed_report_is_that_of_the_committed_figures():
    results = json.loads((RESULTS / "swap.json").read_text(encoding="utf-8"))
    assert (RESULTS / "swap.md").read_text(encoding="utf-8") == markdown(results)
