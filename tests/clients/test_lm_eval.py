"""lm-evaluation-harness on a local task file: the same answers as the recipe, in each form of the trained model."""

import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from recipes.commonsense.parts.answering import answer_questions
from recipes.commonsense.parts.harness import ask, write_tasks
from recipes.commonsense.parts.templates import labels
from recipes.parts.task import Decoding

SET = "social_i_qa"
LABELS = labels("answer", 3)


@pytest.fixture(scope="module")
def evaluate(run, tmp_path_factory):
    """Return a function that evaluates a model on the questions, and returns accuracy, choices and likelihoods."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, {SET: Dataset.from_list(run.questions)})

    def evaluate(model, **more):
        harness = HFLM(model, tokenizer=run.tokenizer, device="cpu", batch_size=8, **more)
        return ask(harness, folder, {SET: run.questions})[SET]

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
    likelihoods = torch.tensor(trained.likelihoods)
    forms = {"merged": evaluate(str(run.merged)), "lora": evaluate(str(run.base), peft=str(run.lora))}
    for found in forms.values():
        torch.testing.assert_close(torch.tensor(found.likelihoods), likelihoods, rtol=0, atol=1e-3)
        assert (found.choices, found.accuracy) == (trained.choices, trained.accuracy)
    base = evaluate(str(run.base))
    assert (torch.tensor(base.likelihoods) - likelihoods).abs().min() > 1


def test_the_recipe_measures_the_same_answers_and_accuracy(run, evaluate, trained):
    load = AutoModelForCausalLM.from_pretrained
    found = {"base": evaluate(str(run.base)), "merged": evaluate(str(run.merged)), "trained": trained}
    models = {"base": load(run.base), "merged": load(run.merged), "trained": run.model}
    for name, model in models.items():
        assert by_the_recipe(run, model) == (found[name].choices, found[name].accuracy), name
    assert found["base"].choices != trained.choices
