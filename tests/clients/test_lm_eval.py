"""lm-evaluation-harness on a local task file: the same answers as the recipe, in each form of the trained model."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from recipes.commonsense.parts.answering import answer_questions
from recipes.commonsense.parts.templates import OUTPUT, labels
from recipes.parts.prompt import prompt_text
from recipes.parts.task import Decoding

LABELS = labels("answer", 3)
TASK = {
    "task": "local_questions",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def evaluate(run, tmp_path_factory):
    """Return a function that evaluates a model on the questions, and returns accuracy, likelihoods and choices."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "prompt": prompt_text(question),
            "choices": [OUTPUT.format(answer=label) for label in LABELS],
            "label": LABELS.index(question["answer"]),
        }
        for question in run.questions
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(model, **more):
        harness = HFLM(model, tokenizer=run.tokenizer, device="cpu", batch_size=8, **more)
        found = simple_evaluate(harness, tasks=["local_questions"], task_manager=manager, bootstrap_iters=0)
        samples = sorted(found["samples"]["local_questions"], key=lambda sample: sample["doc_id"])
        likelihoods = torch.tensor([[likelihood for likelihood, _ in each["filtered_resps"]] for each in samples])
        choices = [LABELS[best] for best in likelihoods.argmax(1)]
        return SimpleNamespace(
            accuracy=found["results"]["local_questions"]["acc,none"], likelihoods=likelihoods, choices=choices
        )

    return evaluate


@pytest.fixture(scope="module")
def trained(run, evaluate):
    """Evaluate the model as the trainer left it."""
    return evaluate(run.model)


def by_the_recipe(run, model) -> tuple[list[str], float]:
    """Return the likeliest answers, and their accuracy, as `make commonsense` measures them."""
    decoding, progress = Decoding(generate=False), tqdm(disable=True)
    answers = answer_questions(
        model.eval(), run.tokenizer, LABELS, Dataset.from_list(run.questions), decoding, progress
    )
    choices = [answer.choice for answer in answers]
    right = sum(choice == question["answer"] for choice, question in zip(choices, run.questions, strict=True))
    return choices, right / len(choices)


def test_trained_merged_and_adapter_agree_question_by_question(run, evaluate, trained):
    forms = {"merged": evaluate(str(run.merged)), "lora": evaluate(str(run.base), peft=str(run.lora))}
    for found in forms.values():
        torch.testing.assert_close(found.likelihoods, trained.likelihoods, rtol=0, atol=1e-3)
        assert (found.choices, found.accuracy) == (trained.choices, trained.accuracy)
    base = evaluate(str(run.base))
    assert (base.likelihoods - trained.likelihoods).abs().min() > 1


def test_the_recipe_measures_the_same_answers_and_accuracy(run, evaluate, trained):
    load = AutoModelForCausalLM.from_pretrained
    found = {"base": evaluate(str(run.base)), "merged": evaluate(str(run.merged)), "trained": trained}
    models = {"base": load(run.base), "merged": load(run.merged), "trained": run.model}
    for name, model in models.items():
        assert by_the_recipe(run, model) == (found[name].choices, found[name].accuracy), name
    assert found["base"].choices != trained.choices
