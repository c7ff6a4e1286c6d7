"""Scores from a few batches, with the model left exactly as it was.

No weight is updated. The authors' code fine-tunes the whole model meanwhile and continues from those weights; base plus
delta would then not give the trained model. Every parameter is frozen except those that the scorer observes, and each
gradient is consumed as soon as it exists. So this takes little more memory than forward and backward through a frozen
model. Statistics that forward changes (batch normalisation) are put back.

`collect_scores` is the loop without a trainer; a trainer's warm-up is in `training/warmup.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smt_trainer.errors import SMTError
from smt_trainer.scores.reach import Reach
from smt_trainer.scores.scorer import Scorer

logger = logging.getLogger(__name__)


def collect_scores(model: nn.Module, scorer: Scorer, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Run forward, and backward if the scorer needs it, on each batch, and return the scores.

    Args:
        model: a plain model whose output has a `loss`.
        scorer: from `make_scorer`.
        batches: keyword arguments of the model, labels included; tensors are moved to the model's device.

    Returns:
        Module name -> scores [R, C] of the targets that forward and backward reach; the same on every rank.

    Raises:
        SMTError: there is no batch, a batch gives no loss, or no target is reached.
    """
    if scorer.needs_warmup:
        device, count = next(model.parameters()).device, 0
        reach = Reach(scorer.targets, scorer.needs_backward)
        with frozen(model), statistics_preserved(model, scorer), scorer.attached(), reach.watching():
            for batch in batches:
                inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
                scorer.begin_batch(inputs)
                output = model(**inputs)
                if scorer.needs_backward:
                    _loss_of(output).backward()
                count += 1
        if not count:
            raise SMTError("there is no batch to score blocks on; give at least one.")
        return reached_scores(scorer, reach)
    return scorer.scores()


def _loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise SMTError("the model returned no loss to score blocks by. Give it labels in each batch.")
    return loss


def reached_scores(scorer: Scorer, reach: Reach) -> dict[str, Tensor]:
    """The scores of a warm-up over all ranks, of the targets that it reached."""
    average_over_ranks(scorer.statistics())
    flags = reach.flags()
    average_over_ranks([flags])
    return reach.keep(scorer.scores(), flags)


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
        """Add what the last step contributes, or leave it out if any part of it overflowed on any rank."""
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
        """Log how many steps do not count. Raises `SMTError` if none counts."""
        if self.skipped == self.steps:
            raise SMTError(
                f"a gradient overflowed in all {self.steps} warm-up steps under fp16, down to a loss scale of "
                f"{self.value:g}. Use bf16, more warm-up steps, or a selection made in another precision."
            )
        if self.skipped:
            logger.info("%d of %d warm-up steps overflowed under fp16 and do not count.", self.skipped, self.steps)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Freeze every parameter; restore `requires_grad` on exit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def statistics_preserved(model: nn.Module, scorer: Scorer) -> Generator[None]:
    """Restore on exit the buffers of a model; within, let batch normalisation use its running statistics if the scorer
    needs them, also where the model is in training."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and scorer.needs_running_statistics]
    were_training = [norm.training for norm in norms]
    # A trainer sets the mode of the whole model before each step.
    handles = [norm.register_forward_pre_hook(lambda norm, _: norm.train(False) and None) for norm in norms]
    try:
        with buffers_preserved(model):
            yield
    finally:
        for norm, handle, was_training in zip(norms, handles, were_training, strict=True):
            handle.remove()
            norm.train(was_training)


@contextlib.contextmanager
def buffers_preserved(model: nn.Module) -> Generator[None]:
    """Restore on exit the buffers that forward may change, such as the statistics of batch normalisation.

    Buffers outside the state dict are caches. Forward computes them again from attributes that are not restored either.
    """
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(values)


def average_over_ranks(statistics: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, one at a time; do nothing on a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # Also of "cuda:nccl,cpu:gloo", since a sum may lie on the GPU of one rank and the CPU of another.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else None
    for total in statistics:
        travelling = total if device is None else total.to(device)
        dist.all_reduce(travelling)
        total.copy_(travelling / dist.get_world_size())
