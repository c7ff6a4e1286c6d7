import json

import pytest
from datasets import Dataset

from recipes.instruct.task import INSTRUCT
from recipes.parts.prompt import prompt_text
from recipes.parts.task import Decoding


def alpaca(number):
    return {"instruction": f"Repeat {number}.", "input": f"Text {number}" if number % 2 else "", "output": f"{number}!"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([alpaca(number) for number in range(40)]))
    return str(path)


def questions(records):
    return set(records["instruction"])


def test_a_tenth_is_held_out_whatever_the_seed(source):
    first, other = (INSTRUCT.load(source, validation=5, seed=seed) for seed in (0, 1))
    assert len(first.test["held out"]) == 4
    assert len(first.validation["held out"]) == 5
    assert len(first.train) == 31
    parts = [questions(part) for part in (first.train, first.validation["held out"], first.test["held out"])]
    assert len(set.union(*parts)) == 40
    assert questions(first.test["held out"]) == questions(other.test["held out"])
    assert questions(first.validation["held out"]) != questions(other.validation["held out"])


def test_a_prompt_shows_the_instruction_and_its_input(source):
    texts = {record["output"]: prompt_text(record) for record in INSTRUCT.load(source, 0, 0).train}
    assert all(f"Repeat {output[:-1]}." in text for output, text in texts.items())
    assert all((f"Text {output[:-1]}" in text) == (int(output[:-1]) % 2 == 1) for output, text in texts.items())


def test_any_other_name_is_a_data_set_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list([{**alpaca(number), "text": ""} for number in range(40)])

    monkeypatch.setattr("recipes.instruct.task.load_dataset", load_dataset)
    assert len(INSTRUCT.load("someone/alpaca", 0, 0).train) == 36
    assert calls == [(("someone/alpaca",), {"split": "train"})]


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected the data of the task 'instruct', got none\. Pass a JSON file"):
        INSTRUCT.load(None, 0, 0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json', which does not exist"):
        INSTRUCT.load(str(tmp_path / "nowhere.json"), 0, 0)


def test_too_few_records_are_refused(tmp_path):
    path = tmp_path / "few.json"
    path.write_text(json.dumps([alpaca(number) for number in range(19)]))
    with pytest.raises(ValueError, match=r"Expected 20 records or more in .*; got 19"):
        INSTRUCT.load(str(path), 0, 0)


def test_only_the_loss_is_measured(model, tokenizer, source):
    result = INSTRUCT.evaluate(model, tokenizer, INSTRUCT.load(source, 0, 0).test, Decoding())
    assert list(result.values) == list(INSTRUCT.measures) == ["loss"]
    assert len(result.values["loss"]["held out"]) == 4
    assert result.texts == {}
