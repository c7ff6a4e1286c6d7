"""Inference on many sequences: evaluation mode, and batches of similar length."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers import PreTrainedModel


@contextmanager
def inference(model: PreTrainedModel) -> Generator[None]:
    """Put `model` in evaluation mode without gradients. Restore its mode, training or evaluation, afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def evaluating(model: PreTrainedModel, number: int) -> Generator[tqdm]:
    """Put `model` in evaluation mode as `inference` does, and show the progress over `number` questions."""
    with inference(model), tqdm(total=number, desc="Evaluating", unit="question") as progress:
        yield progress


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of `lengths`, longest first, in batches of at most `batch_tokens` after padding.

    A sequence longer than `batch_tokens` forms its own batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
