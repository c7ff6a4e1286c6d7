import pytest

from recipes.commonsense.parts import templates
from recipes.commonsense.parts.question_sets import QUESTION_SETS, set_of

EXPECTED = {
    "boolq": (
        templates.boolq,
        {"query": "Elves -- They live.\nQuestion: old?\nQuestion: can elves fly?\nAnswer:", "gold": 1},
        "Please answer the following question with true or false, question: can elves fly?\n\n"
        "Answer format: true/false",
        "false",
    ),
    "piqa": (
        templates.piqa,
        {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "use  wood", "gold": 0},
        "Please choose the correct solution to the question: dresser\n\n"
        "Solution1: replace drawer with bobby pin \n\nSolution2: use  wood\n\n"
        "Answer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        templates.social_i_qa,
        {
            "context": "Kai slept.",
            "question": "Why?",
            "answerA": "tired",
            "answerB": "Bored",
            "answerC": "ill",
            "gold": 2,
        },
        "Please choose the correct answer to the question: Kai slept. Why?\n\n"
        "Answer1: tired Answer2: Bored Answer3: ill\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        templates.hellaswag_row,
        {
            "activity_label": "Health",
            "ctx": "[header] How to rest [title] Lie. [step] Lie  flat.",
            "endings": ["[substeps] Sleep.", "run.", "Eat.", "go."],
            "label": "1",
        },
        "Please choose the correct ending to complete the given sentence: "
        "Health: [header] How to rest [title] Lie. [step] Lie  flat.\n\n"
        "Ending1: [substeps] Sleep. Ending2: run. Ending3: Eat. Ending4: go.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        templates.winogrande,
        {"sentence": "Ann hit Bo because _ was mad.", "option1": "Ann", "option2": "Bo", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann hit Bo because _ was mad.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "option1",
    ),
}
EXPECTED |= {
    name: (
        templates.science,
        {"query": "Question: Stars are\nAnswer:", "choices": choices, "gold": len(choices) - 1},
        f"Please choose the correct answer to the question: Stars are\n\n{listed}\n\nAnswer format: {answers}",
        f"answer{len(choices)}",
    )
    for name, choices, listed, answers in (
        ("ARC-Easy", ["a", "b", "c"], "Answer1: a Answer2: b Answer3: c", "answer1/answer2/answer3"),
        (
            "ARC-Challenge",
            ["a", "b", "c", "d", "e"],
            "Answer1: a Answer2: b Answer3: c Answer4: d Answer5: e",
            "answer1/answer2/answer3/answer4/answer5",
        ),
        (
            "openbookqa",
            ["a", "b", "c", "d"],
            "Answer1: a Answer2: b Answer3: c Answer4: d",
            "answer1/answer2/answer3/answer4",
        ),
    )
}


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_template_is_exact(name):
    template, document, instruction, answer = EXPECTED[name]
    assert QUESTION_SETS[name].test.record is template
    assert template(document) == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("query", "restored"),
    [
        ("Canoeing: Women row. A man  swims. The child", "Canoeing: Women row. A man  swims. the child"),
        ("Health: How to rest. Lie flat.", "Health: How to rest. Lie flat."),
        ('Dodgeball: . A still with the word " jar "', 'Dodgeball: . a still with the word " jar "'),
    ],
)
def test_hellaswag_request_loses_the_capital_of_its_unfinished_sentence_only(query, restored):
    record = templates.hellaswag_request({"query": query, "choices": [" Go.", "b", "c", "d"], "gold": 0})
    assert f"given sentence: {restored}\n\nEnding1:  Go. Ending2: b Ending3: c" in record["instruction"]
    assert record["answer"] == "ending1"


def test_the_answers_of_a_set_cover_its_records():
    for name, (template, document, *_) in EXPECTED.items():
        record = template(document)
        offered = templates.named_answers(record["instruction"])
        assert record["answer"] in offered
        assert set(offered) <= set(QUESTION_SETS[name].answers)


def test_the_set_of_a_record_is_known_by_its_template():
    found = {name: set_of(template(document)) for name, (template, document, *_) in EXPECTED.items()}
    own = {name: name for name in ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande")}
    assert found == own | {
        "ARC-Easy": "social_i_qa",  # three choices
        "ARC-Challenge": "openbookqa",
        "openbookqa": "openbookqa",
    }


def test_an_instruction_of_no_set_is_refused():
    with pytest.raises(ValueError, match="Expected an instruction that ends in 'Answer format"):
        set_of({"instruction": "What is 1 + 1?"})
    with pytest.raises(ValueError, match=r"Expected one of the answer formats .*; got yes/no"):
        set_of({"instruction": "Is it so? Answer format: yes/no"})
