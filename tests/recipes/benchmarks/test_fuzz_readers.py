"""Damaged files are refused or hold what was saved; and the search for failures can find some."""

import json
import random

import pytest

from recipes.benchmarks.fuzz_readers import FAILED, FORGED, OUTCOMES, REFUSED, SAME, markdown, run
from recipes.benchmarks.parts import mutations
from recipes.benchmarks.parts.readers import make_readers


def test_no_damaged_file_is_read_as_something_else_or_raises_another_error():
    results = run(2_000, seed=1)
    assert not results["failures"]
    assert results["outcomes"].keys() == {"delta", "selection", "scores"}
    for counts in results["outcomes"].values():
        assert counts[REFUSED] and counts[SAME] and counts[FORGED] and not counts[FAILED]
    assert all(outcome in markdown(results) for outcome in OUTCOMES)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("smt_trainer.manifest._checksum", "other content was accepted"),
        ("smt_trainer.manifest.check_keys", "KeyError"),
    ],
)
def test_a_reader_without_its_checks_fails(broken, message, monkeypatch):
    monkeypatch.setattr(broken, lambda *_: "the same for all")
    monkeypatch.setattr("smt_trainer.json_files.DAMAGE", ())
    monkeypatch.setattr("smt_trainer.manifest.DAMAGE", ())
    failures = run(600, seed=1)["failures"]
    assert any(message in failure["traceback"] for failure in failures)


def test_a_case_is_the_same_each_time(tmp_path):
    for reader in make_readers(tmp_path).values():
        original = reader.path.read_bytes()
        for mutate in [*reader.mutations[0], *reader.mutations[1]]:
            first, second = (mutate(original, random.Random(3)) for _ in range(2))
            assert first == second


def test_a_header_survives_splitting_and_joining(tmp_path):
    data = make_readers(tmp_path)["delta"].path.read_bytes()
    header, body = mutations.split(data)
    assert mutations.split(mutations.join(header, body)) == (header, body)


def test_edits_reach_every_node():
    value = {"a": [1, {"b": "c"}], "d": None}
    assert mutations.nodes(value) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("d",)]
    texts = {json.dumps(mutations.edit_json(json.loads(json.dumps(value)), random.Random(seed))) for seed in range(99)}
    assert len(texts) > 50
