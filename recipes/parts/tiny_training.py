"""Train the tiny models that the recipes start from, which are not published."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def train_steps(model: nn.Module, columns: Mapping[str, Tensor], batch: int, steps: int, rate: float) -> float:
    """Train all weights on random batches, at a learning rate that rises to `rate` and falls; return the last loss.

    Args:
        model: a model whose output has a `loss`.
        columns: its keyword arguments for all examples, `labels` among them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = torch.randint(len(columns["labels"]), (batch,))
        loss = model(**{name: values[chosen] for name, values in columns.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()
