"""The benchmark of the fingerprint, on a tiny model; and its committed result."""

import json
from pathlib import Path

from recipes.benchmarks.fingerprint import Case, markdown, measure
from recipes.benchmarks.parts.models import tiny

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


def test_a_measurement_has_a_row_for_each_case_and_a_table_of_it():
    results = json.loads(json.dumps(measure([Case("tiny", tiny(2), "bfloat16", "float32")], rounds=2)))
    (row,) = results["cases"]
    assert row["share"] > 0 and all(row[action] > 0 for action in ("load", "read", "fingerprint"))
    assert f"| tiny | {row['parameters']:,} | bfloat16 | float32 |" in markdown(results)


def test_the_committed_report_is_that_of_the_committed_figures():
    results = json.loads((RESULTS / "fingerprint.json").read_text(encoding="utf-8"))
    assert (RESULTS / "fingerprint.md").read_text(encoding="utf-8") == markdown(results)
