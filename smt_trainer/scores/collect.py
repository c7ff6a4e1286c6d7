"""The gradient warm-up: scores from a few batches, with the model left exactly as it was.

No weight is updated (the authors' code fine-tunes the whole model meanwhile and goes on from there; then base plus
delta would not give the model back). All parameters are frozen but for what the scorer observes, and each gradient is
consumed as soon as it exists, so the warm-up needs little more memory than a forward and a backward through a frozen
model.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.scores import Scorer

logger = logging.getLogger(__name__)


class LossScale:
    """Scaling of the loss under fp16, so that small gradients do not vanish: `torch.amp.GradScaler` for a warm-up.

    Attributes:
        value: the factor; halved whenever a gradient overflows. The scores do not depend on it.
        steps: steps that were run.
        skipped: those of them that do not count, since a gradient overflowed.
    """

    def __init__(self) -> None:
        self.value, self.steps, self.skipped = 2.0**16, 0, 0

    def backward(self, loss: Tensor, **_) -> None:
        (loss * self.value).backward()

    def settle(self, scorer: Scorer) -> None:
        """Add what the step just run contributes, unless a part of it overflowed on any rank: then leave it out."""
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
        """Say how many steps do not count. Raises `SMTError` if none does."""
        if self.skipped == self.steps:
            raise SMTError(
                f"a gradient overflowed in all {self.steps} warm-up steps under fp16, down to a loss scale of "
                f"{self.value:g}. Use bf16, more warm-up steps, or a selection made in another precision."
            )
        if self.skipped:
            logger.info("%d of %d warm-up steps overflowed under fp16 and do not count.", self.skipped, self.steps)


def collect_scores(
    model: nn.Module, scorer: Scorer, steps: Iterable[Callable[[], None]], scale: LossScale | None = None
) -> dict[str, Tensor]:
    """Run the warm-up steps under the scorer's eyes.

    Args:
        model: the bare model, not wrapped for several devices.
        scorer: from `make_scorer`; without need of a warm-up it is only asked for its scores.
        steps: each item, when called, runs forward, and backward if the scorer `needs_backward`, of one
            optimizer step's batch, and calls the scorer's `begin_batch` before the forward of each micro-batch.
        scale: the loss scale that the steps run backward with, under fp16; a step that overflows does not count.

    Returns:
        Module name -> scores [R, C]; the same on every rank.

    Raises:
        SMTError: a gradient overflowed in every step.
    """
    if scorer.needs_warmup:
        with frozen(model), scorer.attached(hold=scale is not None):
            for step in steps:
                step()
                if scale is not None:
                    scale.settle(scorer)
        if scale is not None:
            scale.report()
        average_over_ranks(scorer.statistics())
    return scorer.scores()


def optimizer_step_batches(trainer, loader: Iterable) -> Iterator[tuple[list, Tensor | int | None]]:
    """The batches of a trainer's data loader in the order of its main loop, as many at a time as one optimizer step
    takes, and how many labels they hold, if the trainer counts them; epoch after epoch.

    Raises:
        SMTError: an epoch has no batch.
    """
    for epoch in itertools.count():
        # accelerate does not pass the epoch on to a batch sampler that it shards.
        for part in (loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        iterator, empty = iter(loader), True
        while True:
            micro_batches, num_items = trainer.get_batch_samples(
                iterator, trainer.args.gradient_accumulation_steps, trainer.args.device
            )
            if not micro_batches:
                break
            empty = False
            yield micro_batches, num_items
        if empty:
            raise SMTError("the training data gave no batch; the warm-up needs at least one. Check train_dataset.")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient within this context; afterwards those do that did before."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def rng_preserved() -> Iterator[None]:
    """The random states of Python, NumPy, the CPU and this process's GPU are restored on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def counters_preserved(owner: object) -> Iterator[None]:
    """Private attributes of `owner` that hold plain data are restored on leaving: the metrics that some trainers, TRL's
    for one, gather in each training step."""
    counters = {
        name: copy.deepcopy(value) for name, value in vars(owner).items() if name.startswith("_") and _is_plain(value)
    }
    try:
        yield
    finally:
        vars(owner).update(counters)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))


def average_over_ranks(statistics: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, one at a time; nothing to do on a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    for total in statistics:
        travelling = total if device is None else total.to(device)
        dist.all_reduce(travelling)
        total.copy_(travelling / dist.get_world_size())
