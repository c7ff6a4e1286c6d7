import json

import pytest

from recipes.parts.records import cut, cut_validation, read_records, without


def record(question, **fields):
    return {"instruction": question, "input": "", "output": "2", "answer": "2", **fields}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"instruction": ""}, "Expected a JSON array of records"),
        ([], "Expected records in .*, found none"),
        ([record("a"), {"instruction": "b", "input": ""}], "record 1 has no output, answer"),
        ([record("a", answer=2)], "record 0 has no answer"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, message):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_other_fields_are_left_out(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record("a", id=7)]))
    assert read_records(path) == [record("a")]
    assert read_records(path, ("output",)) == [{"output": "2"}]


def test_equal_questions_differ_in_case_spaces_and_punctuation_only():
    train = {"x": [record("How many?"), record("how  many"), record("How much?")]}
    assert without(train, {"y": [record("HOW MANY")]}, "test") == {"x": [record("How much?")]}


def test_a_cut_keeps_every_record_once_and_in_order():
    records = [record(str(n)) for n in range(30)]
    chosen, rest = cut(records, 10, seed=0)
    assert len(chosen) == 10
    assert sorted(chosen + rest, key=records.index) == records
    assert rest == sorted(rest, key=records.index)
    with pytest.raises(ValueError, match="Expected fewer than 30 questions to hold out from as many records, got 30"):
        cut(records, 30, seed=0)


def test_no_validation_leaves_train_as_it_is():
    train = {"x": [record("a")]}
    assert cut_validation(train, 0, seed=0) == (train, {})
