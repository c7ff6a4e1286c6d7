"""Compute scores from a few batches, and leave the model exactly as it was.

No weight is updated. The authors' code fine-tunes the whole model in the warm-up and continues from those weights; base
plus delta would then not equal the trained model. Every parameter is frozen except those that the scorer observes, and
each gradient is consumed as soon as it exists. So this takes little more memory than forward and backward through a
frozen model. Statistics that forward changes (batch normalisation) are restored.

`collect_scores` is the loop without a trainer; a trainer's warm-up is in `training/warmup.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.scores.classes import predicts_next_token
from smt_trainer.scores.preserved import frozen, statistics_preserved
from smt_trainer.scores.reach import Reach
from smt_trainer.scores.scorer import Scorer


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
        with scoring(model, scorer) as reach:
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


@contextlib.contextmanager
def scoring(model: nn.Module, scorer: Scorer, *, by_step: bool = False) -> Generator[Reach]:
    """Attach a scorer to a frozen model within this context, and leave the model as it was.

    Yields what records which targets forward and backward reach. `by_step` is that of `Scorer.attached`.
    """
    reach = Reach(scorer.targets, scorer.needs_backward)
    scorer.predicts_next = predicts_next_token(model)
    # Reach watches last: the scorer's hooks change outputs.
    with frozen(model), statistics_preserved(model, scorer), scorer.attached(by_step=by_step), reach.watching():
        yield reach


def _loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise SMTError("the model returned no loss to score blocks by. Give it labels in each batch.")
    return loss


def reached_scores(scorer: Scorer, reach: Reach) -> dict[str, Tensor]:
    """Return the scores of a warm-up on all ranks, for the targets that it reached."""
    average_over_ranks(scorer.statistics())
    flags = reach.flags()
    average_over_ranks([flags])
    return reach.keep(scorer.scores(), flags)


def average_over_ranks(statistics: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, one at a time; do nothing on a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # Use the GPU even with "cuda:nccl,cpu:gloo", since a sum may be on the GPU of one rank and the CPU of another.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else None
    for total in statistics:
        travelling = total if device is None else total.to(device)
        dist.all_reduce(travelling)
        total.copy_(travelling / dist.get_world_size())
