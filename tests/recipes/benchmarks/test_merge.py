"""The benchmark of `smt merge`, on a tiny model; and its committed result."""

import json
from pathlib import Path

from recipes.benchmarks.merge import markdown, measure
from recipes.benchmarks.parts.models import tiny
from smt_trainer import SMTConfig

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


def test_a_measurement_has_a_time_of_each_process_and_a_table_of_it():
    config = SMTConfig(block_size=16, budget=9, score="random")
    results = json.loads(json.dumps(measure(tiny(2), 60_000, config, rounds=2)))
    assert results["shards"] > 1 and results["largest_shard_bytes"] < results["base_bytes"]
    assert results["seconds"].keys() == {"cp -r", "smt merge", "import torch"}
    assert results["to_copy"]["cp -r"]["median"] == 1
    assert 0 < results["merge_peak_bytes"] < 2**28
    assert f"| `smt merge` | {results['seconds']['smt merge']['median']:.3f} (" in markdown(results)


def test_the_committed_report_is_that_of_the_committed_figures():
    results = json.loads((RESULTS / "merge.json").read_text(encoding="utf-8"))
    assert (RESULTS / "merge.md").read_text(encoding="utf-8") == markdown(results)
