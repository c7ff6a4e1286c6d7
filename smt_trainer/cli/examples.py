"""Read training examples from a JSON file: a list of records, or one record per line.

A record has a `text`, which is learnt whole; or a `prompt` and a `completion`, of which only the latter is learnt; or
`messages`, of which only the last one is learnt, as the chat template writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError, first_line
from smt_trainer.json_files import DAMAGE, parse_json
from smt_trainer.scores.classes import NO_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file.

    Raises:
        SMTError: there is no such file, it holds no records, or one of them is malformed.
    """
    if not path.is_file():
        raise SMTError(f"no data at {path}: expected a JSON file. Check the path.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SMTError(f"{path} is not text in UTF-8 ({error}). Convert it.") from error
    if text.lstrip().startswith("["):
        records = _parse(text, str(path))
    else:
        # Do not use splitlines(): it also splits at separators that JSON allows within strings.
        lines = enumerate(text.split("\n"), 1)
        records = [_parse(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    for place, record in enumerate(records, 1):
        if not _is_record(record):
            found = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
            raise SMTError(
                f"record {place} of {path} should have a text, or a prompt and a completion, as strings, or two or "
                f"more messages with a role and a content each; got {found}."
            )
    if not records:
        raise SMTError(f"{path} holds no records; the warm-up needs some.")
    return records


def make_examples(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[dict[str, Tensor]]:
    """Make token ids and labels of each record, cut to `length` tokens; leave out records with nothing to learn.

    Raises:
        SMTError: no record has anything to learn, or the chat template cannot write messages.
    """
    examples = []
    for record in records:
        prompt, learnt = _tokenize(record, tokenizer)
        ids = torch.tensor([*prompt, *learnt][:length])
        labels = ids.clone()
        # No model predicts the first token.
        labels[: max(len(prompt), 1)] = NO_LABEL
        if (labels != NO_LABEL).any():
            examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise SMTError(f"no record has anything to learn within {length} tokens; raise --seq.")
    if len(examples) < len(records):
        logger.warning("%d of %d records are left out: they have no label.", len(records) - len(examples), len(records))
    return examples


def _tokenize(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of what is learnt."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "text" in record:
        return [], [*tokenizer(record["text"])["input_ids"], *end]
    if "messages" in record:
        # The template writes all special tokens, the end of the answer among them.
        prompt, learnt = tokenizer(_written(record["messages"], tokenizer), add_special_tokens=False)["input_ids"]
        return prompt, learnt
    completion = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
    return tokenizer(record["prompt"])["input_ids"], [*completion, *end]


def _written(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what the chat template writes for all messages but the last, and what it adds for that one."""
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, and raises anything
        raise SMTError(
            f"the tokenizer's chat template cannot write the messages: {first_line(error)} Give one that can, or "
            "records with a prompt and a completion."
        ) from error
    if not whole.startswith(prompt):
        raise SMTError(
            "the chat template writes the first messages differently without and with an answer, so it is unclear "
            "what to learn. Give records with a prompt and a completion."
        )
    return [prompt, whole.removeprefix(prompt)]


def pad(features: list[dict[str, Tensor]], takes: Collection[str]) -> dict[str, Tensor | int]:
    """Collate examples of `make_examples`; padding is masked and carries no label.

    Padding is on the left, so all completions end in the last column, and only the logits from the one that predicts
    the first label on are computed. With a large vocabulary, the others would be the largest tensors of the warm-up.

    Args:
        takes: names of the arguments of the model's forward; `position_ids` and `logits_to_keep` are given if it takes
            them.
    """
    ids = [feature["input_ids"] for feature in features]
    labels = _left_padded([feature["labels"] for feature in features], NO_LABEL)
    mask = _left_padded([torch.ones_like(row) for row in ids], 0)
    batch: dict[str, Tensor | int] = {"input_ids": _left_padded(ids, 0), "attention_mask": mask}
    if "position_ids" in takes:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        first_label = int((labels != NO_LABEL).any(0).int().argmax())
        labels = labels[:, first_label - 1 :]
        batch["logits_to_keep"] = labels.shape[1]
    return batch | {"labels": labels}


def _left_padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, True, value, "left")


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except DAMAGE as error:
        raise SMTError(f"{where} is not JSON ({error}); expected a list of records, or one record per line.") from error


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    if "messages" in record:
        messages = record["messages"]
        return isinstance(messages, list) and len(messages) > 1 and all(map(_is_message, messages))
    return all(_is_text(record.get(key)) for key in (["text"] if "text" in record else ["prompt", "completion"]))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))


def _is_text(value: Any) -> bool:
    """Return whether a value is a string that UTF-8 can encode; JSON can hold half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
