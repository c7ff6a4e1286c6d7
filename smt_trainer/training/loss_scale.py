"""The loss scale of a warm-up under fp16."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.scores.collect import average_over_ranks
from smt_trainer.scores.scorer import Scorer

logger = logging.getLogger(__name__)


class LossScale:
    """Scale the loss of a warm-up under fp16, so that small gradients do not vanish, as `torch.amp.GradScaler` does.

    Attributes:
        value: the factor; halved whenever a gradient overflows. The scores do not depend on it.
        steps: steps that ran.
        skipped: steps that do not count because a gradient overflowed.
    """

    def __init__(self) -> None:
        self.value, self.steps, self.skipped = 2.0**16, 0, 0

    def backward(self, loss: Tensor, **_) -> None:
        """Run backward from the scaled loss."""
        (loss * self.value).backward()

    def settle(self, scorer: Scorer) -> None:
        """Add the last step's contributions to the sums, or skip them if any of them overflowed on any rank."""
        contributions = scorer.take_step()
        overflowed = torch.tensor(any(not part.isfinite().all() for _, part in contributions), dtype=torch.float32)
        average_over_ranks([overflowed])
        self.steps += 1
        if overflowed:
            self.skipped += 1
            self.value /= 2
            return
        for total, part in contributions:
            total.add_(part.to(total.device), alpha=1 / self.value if part.is_floating_point() else 1)

    def report(self) -> None:
        """Log how many steps do not count. Raise `SMTError` if none counts."""
        if self.skipped == self.steps:
            raise SMTError(
                f"a gradient overflowed in all {self.steps} warm-up steps under fp16, down to a loss scale of "
                f"{self.value:g}. Use bf16, more warm-up steps, or a selection made in another precision."
            )
        if self.skipped:
            logger.info("%d of %d warm-up steps overflowed under fp16 and do not count.", self.skipped, self.steps)
