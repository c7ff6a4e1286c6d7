"""The distribution of the scores as rows: a histogram with the cut between two intervals. Needs no matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.model.names import by_projection
from smt_trainer.selection.block_selection import BlockSelection

BINS = 40
# The axis is logarithmic if the highest score is more than this many times the median positive score.
LOGARITHMIC_FROM = 10


class ScoreRow(NamedTuple):
    """Blocks of one projection with a score in [low, high), or of 0 in [0, 0), and how many of them are trained."""

    projection: str
    low: float
    high: float
    blocks: int
    trained: int


def score_rows(scores: Mapping[str, Tensor], selection: BlockSelection) -> list[ScoreRow]:
    """Make a histogram of each projection's scores over the same intervals, with the cut between two of them.

    The intervals have equal widths, or equal ratios of their ends if the scores need a logarithmic axis. Such an axis
    cannot show a score of 0; blocks with that score then come first, in an interval [0, 0).

    Args:
        scores: module name -> [R, C], at least 0, as passed to `select_blocks`.
        selection: the blocks chosen from them.

    Raises:
        SMTError: the scores and the selection have different modules or grids.
    """
    _check_scores(scores, selection)
    values = {name: score.double().numpy() for name, score in scores.items()}
    logarithmic = is_logarithmic(scores, selection)
    edges = _edges(_all(scores), cut(scores, selection), logarithmic)
    rows = []
    for projection, names in by_projection(selection.grids).items():
        every = np.concatenate([values[name].ravel() for name in names])
        chosen = np.concatenate([_chosen(values[name], selection, name) for name in names])
        if logarithmic and not every.all():
            rows.append(ScoreRow(projection, 0.0, 0.0, int((every == 0).sum()), int((chosen == 0).sum())))
        counts = zip(np.histogram(every, edges)[0], np.histogram(chosen, edges)[0], strict=True)
        rows += [
            ScoreRow(projection, low, high, int(blocks), int(trained))
            for low, high, (blocks, trained) in zip(edges, edges[1:], counts, strict=False)
        ]
    return rows


def cut(scores: Mapping[str, Tensor], selection: BlockSelection) -> float:
    """Return the lowest score of a trained block."""
    return min(
        float(scores[name][tuple(indices.T)].min()) for name, indices in selection.block_indices.items() if len(indices)
    )


def is_logarithmic(scores: Mapping[str, Tensor], selection: BlockSelection) -> bool:
    """Return whether the scores need a logarithmic axis and this axis can show the cut."""
    values = _all(scores)
    return cut(scores, selection) > 0 and values.max() > LOGARITHMIC_FROM * np.median(values[values > 0])


def _chosen(values: np.ndarray, selection: BlockSelection, name: str) -> np.ndarray:
    """Return the values of a module's trained blocks."""
    indices = selection.block_indices.get(name)
    return values[:0].ravel() if indices is None else values[tuple(indices.T)]


def _all(scores: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([score.double().flatten().numpy() for score in scores.values()])


def _edges(values: np.ndarray, cut: float, logarithmic: bool) -> list[float]:
    """Return the ends of about `BINS` intervals, equal in width or ratio, that cover all values (but 0) and meet at
    `cut`."""
    high = float(values.max())
    if logarithmic:
        low = float(values[values > 0].min())
        step = math.log(high / low) / BINS
        numbers = range(-math.ceil(math.log(cut / low) / step), math.floor(math.log(high / cut) / step) + 2)
        first, *inner, last = (cut * math.exp(step * number) for number in numbers)
        first = min(first, low)
    else:
        low = float(values.min())
        step = (high - low) / BINS or 1.0
        numbers = range(-math.ceil((cut - low) / step), math.floor((high - cut) / step) + 2)
        first, *inner, last = (cut + step * number for number in numbers)
        first = low
    return [first, *inner, max(last, math.nextafter(high, math.inf))]


def _check_scores(scores: Mapping[str, Tensor], selection: BlockSelection) -> None:
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    expected = {name: grid.shape for name, grid in selection.grids.items()}
    if shapes != expected:
        name = next(name for name in [*expected, *shapes] if shapes.get(name) != expected.get(name))
        raise SMTError(
            f"the scores do not belong to the selection: `{name}` has scores of shape {shapes.get(name)} and a grid of "
            f"{expected.get(name)}. Pass the scores from which the blocks were chosen."
        )
