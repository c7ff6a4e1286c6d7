"""Batches of prompts and answers, padded on the left so that all answers end in the last column.

The loss reads only the answers, at most K tokens. They fill the last K columns, so the model computes the logits of
K + 1 positions instead of all (`logits_to_keep`; the first of them predicts the first answer token). With a vocabulary
of 49,152 the other logits would be the largest tensors of the step, and the loss would ignore them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100


def left_pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as one tensor [rows, longest], with `value` on the left of shorter rows."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def attention(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return `attention_mask` and `position_ids`, each [rows, longest], of rows padded by `left_pad`.

    Both come from the lengths, so a pad id inside a row stays visible, for example an EOS that also pads.
    """
    mask = left_pad([[1] * len(row) for row in rows], 0)
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


@dataclass(frozen=True)
class CompletionCollator:
    """Stack tokenised records into the inputs of a causal language model: a `data_collator` for the Trainer.

    Attributes:
        pad_token_id: id that fills `input_ids` on the left.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor | int]:
        """Return `input_ids`, `attention_mask`, `position_ids` [records, longest], `labels` [records, K + 1] and
        `logits_to_keep` = K + 1, where K is the number of tokens of the longest answer."""
        ids = [feature["input_ids"] for feature in features]
        answers = [sum(label != IGNORED_LABEL for label in feature["labels"]) for feature in features]
        kept = max(answers) + 1
        labels = left_pad([feature["labels"] for feature in features], IGNORED_LABEL)[:, -kept:]
        return {
            "input_ids": left_pad(ids, self.pad_token_id),
            **attention(ids),
            "labels": labels,
            "logits_to_keep": labels.shape[1],
        }
