"""Run one warm-up and yield the scores of several scorers along the way."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from smt_trainer.scores import Scorer
from smt_trainer.scores.preserved import frozen

# These can share a backward pass, since only one of them reads the weights' gradients, which it frees.
SCORES = ("grad_l1", "grad_signed")


def scores_along(
    model: nn.Module, scorers: Mapping[str, Scorer], batches: Iterable[Mapping[str, Any]], after: Iterable[int]
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Run one warm-up with several scorers attached.

    Args:
        model: the bare model. Its weights are not updated.
        scorers: score -> its scorer, unused so far.
        batches: model inputs with labels, one batch for each optimizer step.
        after: numbers of steps after which to yield.

    Yields:
        A number of steps from `after`, and score -> module name -> scores [R, C] after that many steps.
    """
    wanted = set(after)
    with frozen(model), contextlib.ExitStack() as attached:
        for scorer in scorers.values():
            attached.enter_context(scorer.attached())
        for step, batch in enumerate(batches, 1):
            model(**batch).loss.backward()
            if step in wanted:
                yield step, {score: scorer.scores() for score, scorer in scorers.items()}
