"""How well a model predicts a completion, question by question.

A record's completion y_1 ... y_K is its output and the EOS, after the same prompt as in training. With p_k the model's
distribution of the k-th token after the prompt and the right tokens before it,

    loss       -1/K * sum_k log p_k(y_k)                      (nats per token),
    accuracy    1/K * sum_k [y_k is the likeliest of p_k],

with a softmax in float32 whatever the model computes in.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.collator import IGNORED_LABEL, CompletionCollator
from recipes.parts.inference import batches
from recipes.parts.prompt import pad_token, tokenize_for_training

MOST_LOGITS = 2**28
"""Number of logits in the largest batch: 1 GiB in float32."""


class Fit(NamedTuple):
    """The loss of one completion in nats per token, and its accuracy from 0 to 1."""

    loss: float
    accuracy: float


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,
    batch_tokens: int,
    progress: tqdm,
) -> list[float]:
    """Return the loss of each record's completion, in nats per token; see `completion_fits`."""
    return [fit.loss for fit in completion_fits(model, tokenizer, records, batch_tokens, progress)]


def completion_fits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,
    batch_tokens: int,
    progress: tqdm,
) -> list[Fit]:
    """Return loss and accuracy of each record's completion. `model` should be in evaluation mode.

    Args:
        batch_tokens: most tokens in one batch, padding included; fewer if their logits would exceed `MOST_LOGITS`.
        progress: advanced by one for each record.

    Raises:
        ValueError: an output alone is longer than the tokenizer's `model_max_length`.
    """
    rows = [tokenize_for_training(record, tokenizer, tokenizer.model_max_length) for record in records]
    return label_fits(model, rows, pad_token(tokenizer), batch_tokens, progress)


@torch.no_grad()
def label_fits(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, list[int]]],
    pad_token_id: int,
    batch_tokens: int,
    progress: tqdm | None = None,
) -> list[Fit]:
    """Return loss and accuracy of each row's labels.

    Args:
        rows: `input_ids` and `labels`, which are -100 before the completion.
        pad_token_id, batch_tokens, progress: as in `completion_fits`.
    """
    collate = CompletionCollator(pad_token_id)
    most_tokens = min(batch_tokens, MOST_LOGITS // model.get_output_embeddings().weight.shape[0])
    fits = {}
    for batch in batches([len(row["input_ids"]) for row in rows], most_tokens):
        inputs = collate([rows[index] for index in batch])
        labels = inputs.pop("labels")[:, 1:].to(model.device)
        logits = _logits(model, inputs)
        for index, scores, targets in zip(batch, logits, labels, strict=True):
            likeliest = scores.argmax(-1)[targets != IGNORED_LABEL] == targets[targets != IGNORED_LABEL]
            loss = cross_entropy(scores.float(), targets, ignore_index=IGNORED_LABEL)
            fits[index] = Fit(loss.item(), likeliest.float().mean().item())
        if progress is not None:
            progress.update(len(batch))
    return [fits[index] for index in range(len(rows))]


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor | int]) -> torch.Tensor:
    """Return the logits that predict the completions, [records, K, vocabulary]."""
    tensors = {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    output = model(**tensors, logits_to_keep=inputs["logits_to_keep"], use_cache=False)
    return output.logits[:, :-1]
