import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from recipes.glue.parts.data import load_texts, text_columns
from recipes.glue.task import GLUE

ROWS = [{"question": f"q{place}", "sentence": f"s{place}", "label": place % 2, "idx": place} for place in range(20)]


@pytest.mark.parametrize("ending", ["json", "parquet", "tsv", "csv"])
def test_every_kind_of_file_is_read_and_a_fifth_held_out(tmp_path, ending):
    rows, path = Dataset.from_list(ROWS), tmp_path / f"own.{ending}"
    if ending == "parquet":
        rows.to_parquet(path)
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    else:
        rows.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    examples = load_texts(str(path), None)
    assert (len(examples.train), len(examples.held_out), examples.classes) == (16, 4, ["0", "1"])
    assert text_columns(examples.train) == ["question", "sentence"]
    assert not set(examples.train["question"]) & set(examples.held_out["question"])


def test_a_task_of_glue_is_measured_on_validation_since_its_test_labels_are_hidden(monkeypatch):
    features = Features(
        question=Value("string"), sentence=Value("string"), label=ClassLabel(names=["a", "b"]), idx=Value("int32")
    )
    splits = {name: Dataset.from_list(ROWS[:size], features) for name, size in (("train", 9), ("validation", 5))}
    hidden = Dataset.from_list([row | {"label": -1} for row in ROWS[:3]], features)
    calls = []
    monkeypatch.setattr(
        "recipes.glue.parts.data.load_dataset",
        lambda *names: calls.append(names) or DatasetDict(**splits, test=hidden),
    )
    examples = load_texts("qnli", None)
    assert calls == [("nyu-mll/glue", "qnli")]
    assert (len(examples.train), len(examples.held_out), examples.classes) == (9, 5, ["a", "b"])


def test_each_task_has_the_measure_that_glue_asks_for():
    names = {source: list(GLUE.measures(source, ["a", "b"])) for source in ("cola", "mrpc", "qqp", "rte", None)}
    assert names["cola"] == ["Matthews", "loss"]
    assert names["mrpc"] == names["qqp"] == ["accuracy", "F1", "loss"]
    assert names["rte"] == names[None] == ["accuracy", "loss"]
    assert list(GLUE.measures("stsb", [])) == ["Pearson", "Spearman", "squared error"]


def test_data_of_another_form_are_refused(tmp_path):
    path = tmp_path / "own.csv"
    with pytest.raises(FileNotFoundError, match=r"own\.csv, which has none"):
        load_texts(str(path), None)
    Dataset.from_list([{"text": "a", "kind": "b"}] * 10).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"in the column 'label'; its columns are text, kind\. Name one"):
        load_texts(str(path), None)
    Dataset.from_list([{"number": 1, "label": "b"}] * 10).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"one or two columns of texts besides the labels in own\.csv, got none"):
        load_texts(str(path), None)


def test_a_held_out_class_that_training_never_shows_is_refused(tmp_path):
    for split, label in (("train", "known"), ("test", "new")):
        Dataset.from_list([{"text": "a", "label": label}] * 4).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.raises(ValueError, match=r"got \['new'\] as well"):
        load_texts(str(tmp_path), None)
