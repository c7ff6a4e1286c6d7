"""One warm-up that is asked for its scores along the way."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from smt_trainer.scores import Scorer
from smt_trainer.scores.collect import frozen

# Of the scores that share a pass, one alone may take the weights' gradients, which it frees.
SCORES = ("grad_l1", "grad_signed")


def scores_along(
    model: nn.Module, scorers: Mapping[str, Scorer], batches: Iterable[Mapping[str, Any]], after: Iterable[int]
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Run a warm-up once, under the eyes of several scorers.

    Args:
        model: the bare model; no weight of it is updated.
        scorers: score -> its scorer, new.
        batches: the inputs of one optimizer step each, with labels.
        after: numbers of steps.

    Yields:
        A number of steps in `after`, and score -> module name -> scores [R, C] of these steps.
    """
    wanted = set(after)
    with frozen(model), contextlib.ExitStack() as attached:
        for scorer in scorers.values():
            attached.enter_context(scorer.attached())
        for step, batch in enumerate(batches, 1):
            model(**batch).loss.backward()
            if step in wanted:
                yield step, {score: scorer.scores() for score, scorer in scorers.items()}
