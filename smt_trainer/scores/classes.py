"""Find the classes of training examples, for scores that use classes.

The class of an example is the value of a column of the training data, or else its label: the label itself if each
example has one, the first label that is not -100 if each token has one. A class is represented by a 64-bit integer, the
label or a hash of the column's value, so that strings can be classes, too, and all ranks agree.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError

CLASSES_KEY = "smt_classes"
NO_LABEL = -100


def take_classes(inputs: MutableMapping[str, Any], column: str | None) -> Tensor:
    """Return the classes [B] of a batch's examples, int64 on the CPU; remove those of a column from the batch.

    Args:
        inputs: a collated batch.
        column: the configured `class_column`; None for the labels, which stay in the batch.

    Raises:
        SMTError: the batch has no classes, or its labels are not classes.
    """
    if column is not None:
        if CLASSES_KEY not in inputs:
            raise SMTError(
                f"the batches of the warm-up come without class_column={column!r}, because the trainer's data_collator "
                "does not collate them. Do not override get_train_dataloader, or leave class_column at None."
            )
        return inputs.pop(CLASSES_KEY).cpu()
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.ndim not in (1, 2):
        found = f"{labels.dtype} of {list(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
        raise SMTError(
            "classes are read from integer labels, one for each example or one for each token, unless class_column "
            f"names a column of the training data; got labels: {found}."
        )
    labels = labels.cpu().long()
    if labels.ndim == 1:
        return labels
    first = (labels != NO_LABEL).int().argmax(1, keepdim=True)
    return labels.gather(1, first).squeeze(1)


def loss_terms(inputs: Mapping[str, Any], examples: int, predicts_next: bool) -> Tensor:
    """Count the loss terms of each example [B]: its labelled tokens, or one if the example has a single label.

    Nothing predicts the first token of a sequence if each token `predicts_next`.
    """
    labels = inputs.get("labels")
    if torch.is_tensor(labels) and labels.ndim == 2 and not labels.is_floating_point():
        return (labels[:, int(predicts_next) :] != NO_LABEL).sum(1).cpu()
    return torch.ones(examples, dtype=torch.long)


def predicts_next_token(model: nn.Module) -> bool:
    """Return whether the loss of a model is that of a causal language model, which shifts the labels by one token."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return is_decoder and getattr(model, "loss_function", None) is ForCausalLMLoss
