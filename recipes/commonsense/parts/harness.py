"""The questions as tasks of lm-evaluation-harness: one multiple-choice task for each set.

The context is the prompt of the recipe and each choice an output that the question offers, so the harness compares the
same likelihoods as the recipe. It needs `lm-eval` (`pip install '.[clients]'`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from recipes.commonsense.parts.templates import OUTPUT, named_answers
from recipes.parts.prompt import prompt_text
from smt_trainer.files import write_text

PREFIX = "smt_"


class Answers(NamedTuple):
    """The harness's results on one set.

    Attributes:
        accuracy: share of questions whose likeliest choice is right.
        choices: the likeliest answer of each question.
        likelihoods: log-likelihoods of each question's choices, in nats.
    """

    accuracy: float
    choices: list[str]
    likelihoods: list[list[float]]


def write_tasks(folder: Path, questions: Mapping[str, Dataset]) -> None:
    """Write the questions of each set, and a task for them that `lm_eval --include_path` finds."""
    for name, asked in questions.items():
        rows = [_row(question) for question in asked]
        write_text(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        # JSON is YAML.
        write_text(folder / f"{name}.yaml", json.dumps(_task(name, folder), indent=2))


def _row(question: Mapping[str, str]) -> dict[str, Any]:
    offered = named_answers(question["instruction"])
    return {
        "prompt": prompt_text(question),
        "choices": [OUTPUT.format(answer=answer) for answer in offered],
        "label": offered.index(question["answer"]),
    }


def _task(name: str, folder: Path) -> dict[str, Any]:
    return {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def ask(model: LM, folder: Path, questions: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Answers]:
    """Run the harness on the tasks that `write_tasks` wrote into `folder`. Return set -> answers."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=[PREFIX + name for name in questions], task_manager=manager, bootstrap_iters=0)
    return {name: _answers(found, PREFIX + name, asked) for name, asked in questions.items()}


def _answers(found: dict, task: str, questions: Sequence[Mapping[str, str]]) -> Answers:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    likelihoods = [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples]
    choices = [
        named_answers(question["instruction"])[each.index(max(each))]
        for question, each in zip(questions, likelihoods, strict=True)
    ]
    return Answers(found["results"][task]["acc,none"], choices, likelihoods)
