"""The estimator agrees with the committed measurements."""

import json
from pathlib import Path

import pytest

from recipes.benchmarks.estimator import compare, is_modelled, main
from recipes.benchmarks.parts.methods import SMT

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"
MEASURED = [path for path in sorted(RESULTS.glob("step-*.json")) if is_modelled(json.loads(path.read_text()))]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_memory_is_within_a_tenth_of_what_was_measured(path):
    rows = compare(json.loads(path.read_text()))
    assert {SMT, "LoRA"} <= {row["method"] for row in rows}
    for row in rows:
        assert row["estimated_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1), row


def test_the_comparison_of_a_folder_is_written_beside_its_results(tmp_path):
    (tmp_path / MEASURED[0].name).write_text(MEASURED[0].read_text())
    main(["--results", str(tmp_path)])
    rows = json.loads((tmp_path / "estimator.json").read_text())
    table = (tmp_path / "estimator.md").read_text()
    assert len(rows) > 2 and all(f"| {row['method']} |" in table for row in rows)
