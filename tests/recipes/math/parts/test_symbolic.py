import random
import re

import pytest

from recipes.math.parts import symbolic
from recipes.math.parts.generators import generators
from recipes.math.parts.symbolic import NEW_NUMBERS, NEW_TEMPLATES, draw, numbers_in, symbolic_splits


def template(number, numbers=1000):
    """Return a generator that names its template and a friend, and adds one number of `numbers` to itself."""

    def generate(rng):
        a, name = rng.randrange(numbers), rng.choice(["Ann", "Bob"])
        question = f"[template {chr(97 + number)}] {name} has {a} apples and gets as many. How many now?"
        solution = f"She has twice {a}.\n        #### {2 * a}"
        return {"question": question, "answer": str(2 * a), "metadata": {"answer_cot": solution}}

    return generate


@pytest.fixture
def templates(monkeypatch):
    """Twelve templates, one of which has only five different numbers, and small splits."""
    fakes = {number: template(number, 5 if number == 3 else 1000) for number in range(12)}
    monkeypatch.setattr(symbolic, "generators", lambda: fakes)
    monkeypatch.setattr(symbolic, "TEST_TEMPLATES", 3)
    monkeypatch.setattr(symbolic, "VALIDATION_TEMPLATES", 2)
    monkeypatch.setattr(symbolic, "RECORDS_PER_TEMPLATE", 20)
    monkeypatch.setattr(symbolic, "TEST_QUESTIONS", 15)
    return fakes


def template_of(question):
    return re.search(r"\[template .\]", question)[0]


def check(splits, template_of):
    """Check that no question, no numbers of a template and no held-out template is in two splits."""
    sets = {
        "train": splits.train,
        **{f"validation {name}": records for name, records in splits.validation.items()},
        **{f"test {name}": records for name, records in splits.test.items()},
    }
    questions = [question for records in sets.values() for question in records["instruction"]]
    assert len({(template_of(question), numbers_in(question)) for question in questions}) == len(questions)
    used = {name: set(map(template_of, records["instruction"])) for name, records in sets.items()}
    trained = used["train"]
    assert used[f"test {NEW_NUMBERS}"] <= trained
    assert used[f"validation {NEW_NUMBERS}"] <= trained
    assert trained.isdisjoint(used[f"test {NEW_TEMPLATES}"])
    assert trained.isdisjoint(used[f"validation {NEW_TEMPLATES}"])
    assert used[f"test {NEW_TEMPLATES}"].isdisjoint(used[f"validation {NEW_TEMPLATES}"])
    for records in sets.values():
        assert records.column_names == ["instruction", "input", "output", "answer", "template"]
        for record in records:
            assert record["output"].endswith(f"\n#### {record['answer']}")


def test_no_question_and_no_held_out_template_is_in_two_splits(templates):
    splits = symbolic_splits(validation=10, seed=0)
    check(splits, template_of)
    assert {len(records) for records in splits.test.values()} == {15}
    assert {len(records) for records in splits.validation.values()} == {10}


def test_the_seed_decides_the_validation_questions_only(templates):
    first, again, other = (symbolic_splits(validation=10, seed=seed) for seed in (0, 0, 1))
    for name in (NEW_NUMBERS, NEW_TEMPLATES):
        assert first.test[name].to_list() == other.test[name].to_list()
        assert first.validation[name].to_list() == again.validation[name].to_list()
        assert first.validation[name].to_list() != other.validation[name].to_list()
    assert first.train.to_list() == again.train.to_list()


def test_without_validation_all_records_stay_in_train(templates):
    splits = symbolic_splits(validation=0, seed=0)
    assert splits.validation == {}
    assert len(splits.train) == len(symbolic_splits(validation=10, seed=0).train) + 10


def test_more_validation_than_questions_is_refused(templates):
    with pytest.raises(ValueError, match="Expected fewer than 40 questions to hold out from as many records, got 40"):
        symbolic_splits(validation=40, seed=0)


def test_a_template_gives_each_of_its_numbers_once(templates):
    records = draw(template(3, numbers=5), 3)
    assert sorted(numbers_in(record["instruction"]) for record in records) == [(str(n),) for n in range(5)]
    assert records[0]["output"].count("\n#### ") == 1


def test_a_solution_that_ends_in_another_answer_is_refused(templates):
    def flawed(rng):
        return {"question": "1?", "answer": "24", "metadata": {"answer_cot": "So 24.\n#### 24.0"}}

    with pytest.raises(ValueError, match=r"ends in '#### 24', got '#### 24\.0' for '1\?'.*FLAWED"):
        draw(flawed, 0)


def test_the_numbers_of_a_question_are_those_in_digits():
    assert numbers_in("It costs $1,250.50, or 3/4 of two.") == ("1,250.50", "3", "4")


@pytest.mark.slow
def test_the_real_splits_hold_out_questions_and_templates(monkeypatch):
    monkeypatch.undo()  # the real cache folder
    templates = generators()
    assert len(templates) == 77
    origin = {record["instruction"]: number for number in templates for record in draw(templates[number], number)}
    splits = symbolic_splits(validation=100, seed=0)
    check(splits, origin.__getitem__)
    assert {len(records) for records in splits.test.values()} == {symbolic.TEST_QUESTIONS}
    assert len(splits.train) > 6500
    assert len(set(map(origin.__getitem__, splits.test[NEW_TEMPLATES]["instruction"]))) == symbolic.TEST_TEMPLATES


@pytest.mark.slow
def test_the_real_generators_draw_the_same_for_the_same_seed(monkeypatch):
    monkeypatch.undo()  # the real cache folder
    for first, second in zip(generators().values(), generators().values(), strict=True):
        assert first(random.Random(1))["question"] == second(random.Random(1))["question"]
