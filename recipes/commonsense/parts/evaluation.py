"""Accuracy on the commonsense tasks by generation and by likelihood, and the gain between two evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean, variance

from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.parts.answering import answer_questions
from recipes.commonsense.parts.metric import ChoiceAccuracy
from recipes.commonsense.parts.tasks import TASKS
from recipes.parts.prompt import pad_token

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation, by task, in the order of each task's questions.

    Attributes:
        texts: generated texts.
        correct: whether the first answer in the text is the gold one.
        correct_by_likelihood: whether the likeliest of the offered answers is the gold one.
    """

    texts: dict[str, list[str]]
    correct: dict[str, list[bool]]
    correct_by_likelihood: dict[str, list[bool]]

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Join `parts`, each the evaluation of a consecutive share of every task's questions."""
        return cls(
            *(
                {
                    task: [value for part in parts for value in getattr(part, field.name)[task]]
                    for task in parts[0].texts
                }
                for field in fields(cls)
            )
        )

    @property
    def accuracy(self) -> dict[str, float]:
        """Task -> share of its questions answered correctly by generation, in [0, 1]."""
        return {task: mean(map(float, correct)) for task, correct in self.correct.items()}

    @property
    def accuracy_by_likelihood(self) -> dict[str, float]:
        """Task -> share of its questions answered correctly by likelihood, in [0, 1]."""
        return {task: mean(map(float, correct)) for task, correct in self.correct_by_likelihood.items()}

    @property
    def average(self) -> float:
        """Unweighted mean of the tasks' accuracy by generation."""
        return mean(self.accuracy.values())

    @property
    def average_likelihood(self) -> float:
        """Unweighted mean of the tasks' accuracy by likelihood."""
        return mean(self.accuracy_by_likelihood.values())


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Mapping[str, Dataset],
    *,
    max_new_tokens: int,
    num_beams: int,
    batch_tokens: int,
) -> Evaluation:
    """Evaluate `model` on the questions of `test`, a data set of records for each task.

    Restore the model's mode, training or evaluation. Processes do not communicate: each may evaluate all questions or
    its own share.

    Args:
        max_new_tokens: longest generation, in tokens; EOS ends it earlier.
        num_beams: 1 decodes greedily.
        batch_tokens: most tokens in one batch of prompts, padding included.
    """
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        # Otherwise `generate` falls back on the model's own default, which may be a penalty.
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token(tokenizer),
        use_cache=True,
    )
    texts, correct, correct_by_likelihood = {}, {}, {}
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=sum(map(len, test.values())), desc="Evaluating", unit="question") as progress:
            for name, questions in test.items():
                metric = ChoiceAccuracy(name)
                answers = answer_questions(model, tokenizer, TASKS[name], questions, generation, batch_tokens, progress)
                gold = questions["answer"]
                texts[name] = [answer.text for answer in answers]
                correct[name] = metric.correct(texts[name], gold)
                correct_by_likelihood[name] = metric.correct([answer.choice for answer in answers], gold)
    finally:
        model.train(was_training)
    return Evaluation(texts, correct, correct_by_likelihood)


def paired_gain(before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """Return the gain of the unweighted task average and the half width of its 95 % interval, both as shares.

    Both runs answer the same questions, so each question gives one difference d in {-1, 0, 1}. For K tasks with n_k
    questions each,

        gain = mean_k mean(d_k),    half width = 1.96 / K * sqrt(sum_k var(d_k) / n_k).

    Args:
        before: correctness of each question by task: `Evaluation.correct` or `correct_by_likelihood`.
        after: the same after training.

    Raises:
        ValueError: the runs have different tasks or numbers of questions, or a task has fewer than two questions.
    """
    sizes, sizes_after = ({task: len(correct) for task, correct in run.items()} for run in (before, after))
    if sizes != sizes_after or min(sizes.values(), default=0) < 2:
        raise ValueError(
            "Expected the same tasks and questions before and after, at least two of each task; "
            f"got {sizes} and {sizes_after}. Evaluate both models on one test set."
        )
    differences = [[int(new) - int(old) for old, new in zip(before[task], after[task], strict=True)] for task in before]
    gain = mean(map(mean, differences))
    spread = sum(variance(difference) / len(difference) for difference in differences)
    return gain, NORMAL_95 * spread**0.5 / len(differences)
