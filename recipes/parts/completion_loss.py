"""The loss of a completion, question by question.

A record's completion y_1 ... y_K is its output and the EOS, after the same prompt as in training. Its loss is

    -1/K * sum_k log p(y_k | prompt, y_1 ... y_(k-1))        (nats per token),

with a softmax in float32 whatever the model computes in.
"""

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.collator import CompletionCollator
from recipes.parts.inference import batches
from recipes.parts.prompt import pad_token, tokenize_for_training

MOST_LOGITS = 2**28
"""Number of logits in the largest batch: 1 GiB in float32."""


@torch.no_grad()
def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,
    batch_tokens: int,
    progress: tqdm,
) -> list[float]:
    """Return the loss of each record's completion, in nats per token. `model` should be in evaluation mode.

    Args:
        batch_tokens: most tokens in one batch, padding included; fewer if their logits would exceed `MOST_LOGITS`.
        progress: advanced by one for each record.

    Raises:
        ValueError: an output alone is longer than the tokenizer's `model_max_length`.
    """
    collate = CompletionCollator(pad_token(tokenizer))
    rows = [tokenize_for_training(record, tokenizer, tokenizer.model_max_length) for record in records]
    most_tokens = min(batch_tokens, MOST_LOGITS // model.get_output_embeddings().weight.shape[0])
    losses = {}
    for batch in batches([len(row["input_ids"]) for row in rows], most_tokens):
        inputs = collate([rows[index] for index in batch])
        labels = inputs.pop("labels")[:, 1:].to(model.device)
        logits = _logits(model, inputs)
        for index, scores, targets in zip(batch, logits, labels, strict=True):
            losses[index] = cross_entropy(scores.float(), targets).item()
        progress.update(len(batch))
    return [losses[index] for index in range(len(rows))]


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor | int]) -> torch.Tensor:
    """Return the logits that predict the completions, [records, K, vocabulary]."""
    tensors = {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    output = model(**tensors, logits_to_keep=inputs["logits_to_keep"], use_cache=False)
    return output.logits[:, :-1]
