import json
import logging

import pytest

from recipes.math.parts.files import QUESTION_SETS, file_splits


def record(question, answer="2.0"):
    return {"instruction": question, "input": "", "output": f"The answer is {answer}.", "answer": answer}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


@pytest.fixture
def folder(tmp_path):
    """LLM-Adapters' files: three test sets, two of them with train files."""
    path = tmp_path / "files"
    for name, answer in (("gsm8k", "2.0"), ("AQuA", "C"), ("MultiArith", "1,000")):
        write(path / name / "test.json", [record(f"{name} test {n}?", answer) for n in range(3)])
        if name != "MultiArith":
            write(path / name / "train.json", [record(f"{name} train {n}?", answer) for n in range(10)])
    return path


@pytest.fixture
def mixed(folder):
    """A train file in a folder of test sets without train files."""
    for path in folder.glob("*/train.json"):
        path.unlink()
    write(folder / "math_10k.json", [record(f"train {n}?", answer) for n, answer in enumerate("ABCDE" * 2)])
    return folder / "math_10k.json"


def test_a_folder_gives_all_splits_in_the_papers_order(folder):
    splits = file_splits(str(folder), validation=2, seed=0)
    assert {name: len(records) for name, records in splits.test.items()} == {"MultiArith": 3, "gsm8k": 3, "AQuA": 3}
    assert list(splits.test) == [name for name in QUESTION_SETS if name in splits.test]
    assert {name: len(records) for name, records in splits.validation.items()} == {"gsm8k": 2, "AQuA": 2}
    assert len(splits.train) == 16
    assert splits.train.column_names == ["instruction", "input", "output", "answer"]


def test_the_mixed_file_of_a_folder_serves_without_train_files(mixed):
    for source in (mixed, mixed.parent):
        splits = file_splits(str(source), validation=3, seed=0)
        assert len(splits.train) == 7
        assert {name: len(records) for name, records in splits.validation.items()} == {"math_10k": 3}
        assert list(splits.test) == ["MultiArith", "gsm8k", "AQuA"]


def test_a_train_record_that_equals_a_test_question_of_any_set_is_dropped_and_counted(folder, caplog):
    write(folder / "AQuA" / "train.json", [record("GSM8K: test 1"), record("new"), record("newer")])
    with caplog.at_level(logging.INFO):
        splits = file_splits(str(folder), validation=0, seed=0)
    assert "Dropped 1 train records that equal a test question" in caplog.text
    assert len(splits.train) == 12


def test_validation_comes_from_train_and_leaves_it(folder):
    path = folder / "gsm8k" / "train.json"
    write(path, 2 * json.loads(path.read_text()))
    splits = file_splits(str(folder), validation=4, seed=0)
    for name, records in splits.validation.items():
        assert all(f"{name} train" in instruction for instruction in records["instruction"])
        assert set(records["instruction"]).isdisjoint(splits.train["instruction"])


def test_the_seed_decides_the_validation_records(folder):
    first, again, other = (file_splits(str(folder), 4, seed).validation["gsm8k"]["instruction"] for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)


def test_the_file_of_test_questions_is_refused_for_training(mixed):
    path = mixed.rename(mixed.with_name("math_data.json"))
    with pytest.raises(ValueError, match=r"got .*math_data\.json: 80 % of this file .* test sets\. Train on"):
        file_splits(str(path), 0, 0)


def test_missing_files_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere', which does not exist"):
        file_splits(str(tmp_path / "nowhere"), 0, 0)
    with pytest.raises(FileNotFoundError, match=r"Expected <question set>/train.json or one of .* found none"):
        file_splits(str(tmp_path), 0, 0)
    write(tmp_path / "alone.json", [record("a?")])
    with pytest.raises(FileNotFoundError, match=r"Expected <question set>/test.json in .*; found none"):
        file_splits(str(tmp_path / "alone.json"), 0, 0)


def test_two_mixed_files_are_refused(mixed):
    write(mixed.with_name("train.json"), [record("a?")])
    with pytest.raises(FileNotFoundError, match=r"found train.json and math_10k.json\. Pass the path"):
        file_splits(str(mixed.parent), 0, 0)


def test_a_question_whose_answer_cannot_be_compared_is_refused(folder):
    write(folder / "gsm8k" / "test.json", [record("a?", "two")])
    with pytest.raises(ValueError, match="as the answer to every question of gsm8k, got 'two'"):
        file_splits(str(folder), 0, 0)
