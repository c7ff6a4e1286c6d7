import pytest

from recipes.math.parts.metric import SolutionAccuracy, is_answer, letter


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("2 + 3 = 5\n#### 5", "5", True),
        ("#### 5.0", "5", True),
        ("#### 1,250", "1250", True),
        ("####-3", "-3", True),
        ("#### 4\n#### 5", "5", True),
        ("#### 5\n#### 4", "5", False),
        ("#### 5 apples, not 6", "5", True),
        ("#### 55", "5", False),
        ("#### five, so 5", "5", False),
        ("####", "5", False),
        ("The answer is 5", "5", False),
        ("", "5", False),
    ],
)
def test_the_strict_rule_reads_the_number_after_the_last_mark(text, gold, right):
    assert SolutionAccuracy("strict").correct([text], [gold]) == [right]


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("He has 2 + 3 = 5 apples.", "5.0", True),
        ("5, or rather 6", "5", False),
        ("It costs $1,234.50.", "1234.5", True),
        ("1/3 = 0.3333", "0.3333333333", True),
        ("0.332", "0.3333333333", False),
        ("The temperature is -15 degrees", "-15.0", True),
        ("none", "0", False),
    ],
)
def test_the_flexible_rule_reads_the_last_number(text, gold, right):
    assert SolutionAccuracy("flexible").correct([text], [gold]) == [right]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Because 3 < 4, the answer is (C).", "C"),
        ("A man walks 3 miles. The Answer is: B", "B"),
        ("the answer is D, not the answer is E", "D"),
        ("(E) 29", "E"),
        ("Because", None),
        ("the answer is Apples", None),
        ("F", None),
    ],
)
def test_a_letter_is_read_where_the_answer_is_stated_else_where_it_stands_alone(text, named):
    assert letter(text) == named
    assert SolutionAccuracy("flexible").correct([text, text], ["C", named or "A"]) == [named == "C", named is not None]


@pytest.mark.parametrize(("text", "answer"), [("-1,200.5", True), ("E", True), ("F", False), ("5 apples", False)])
def test_a_gold_answer_is_a_number_or_a_letter(text, answer):
    assert is_answer(text) == answer


def test_accuracy_is_the_mean_of_the_correct_answers():
    accuracy = SolutionAccuracy("flexible").compute(predictions=["1", "2", "C", "no"], references=["1", "3", "C", "4"])
    assert accuracy == {"accuracy": 0.5}


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="Expected a rule among strict, flexible; got 'lenient'"):
        SolutionAccuracy("lenient")
