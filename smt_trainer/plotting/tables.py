"""The numbers behind each picture, as rows; no matplotlib.

A projection is all modules that have one place in every layer: `v_proj` is `model.layers.*.self_attn.v_proj`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.files import write_text
from smt_trainer.selection import BlockSelection
from smt_trainer.targets import layer_index

BINS = 40
# Scores whose highest is more than this many times their median are shown on a logarithmic axis.
LOGARITHMIC_FROM = 10


class SelectionRow(NamedTuple):
    """One trained block: row `row` and column `column` of its module's grid."""

    module: str
    projection: str
    layer: int
    row: int
    column: int


class LayerRow(NamedTuple):
    """One projection in one layer: blocks trained, of how many; `layer` is -1 outside the layers."""

    projection: str
    layer: int
    trained: int
    blocks: int


class ShareRow(NamedTuple):
    """One projection: its blocks and weights, and its shares (0 to 1) of all trained and of all targeted weights."""

    projection: str
    trained: int
    blocks: int
    trained_weights: int
    weights: int
    share_of_trained: float
    share_of_targets: float


class ScoreRow(NamedTuple):
    """Blocks of one projection with a score in [low, high), and how many of them are trained."""

    projection: str
    low: float
    high: float
    blocks: int
    trained: int


class OverlapPoint(NamedTuple):
    """How much a selection after a short warm-up has in common with another one.

    Attributes:
        score: name of the score.
        steps: length of the warm-up, in optimizer steps.
        against: what it is compared with, such as "longest warm-up" or "other seed".
        seed: label of the data order, or of the pair of them.
        jaccard: blocks in both selections over blocks in either, 0 to 1.
        chance: the Jaccard index expected of two random selections of this size.
        rank_correlation: Spearman's, of the scores of all blocks, -1 to 1.
    """

    score: str
    steps: int
    against: str
    seed: str
    jaccard: float
    chance: float
    rank_correlation: float


def by_projection(names: Iterable[str]) -> dict[str, list[str]]:
    """Projection -> its modules, in order. Its label is the last part of their names; where several projections share
    that (T5's `q`), the parts in which they differ lead it: `decoder.EncDecAttention.q`."""
    paths: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        paths.setdefault(tuple(part for part in name.split(".") if not part.isdigit()), []).append(name)
    labelled: dict[str, list[str]] = {}
    for path, modules in paths.items():
        shared = set.intersection(*(set(other) for other in paths if other[-1] == path[-1]))
        label = ".".join([*(part for part in path[:-1] if part not in shared), path[-1]])
        labelled.setdefault(label, []).extend(modules)
    return labelled


def selection_rows(selection: BlockSelection) -> list[SelectionRow]:
    """Every trained block, in the model's order and row by row."""
    return [
        SelectionRow(name, projection, layer_index(name), *block)
        for projection, names in by_projection(selection.grids).items()
        for name in names
        if name in selection.block_indices
        for block in selection.block_indices[name].tolist()
    ]


def layer_rows(selection: BlockSelection) -> list[LayerRow]:
    """Trained blocks of each projection in each of its layers, the frozen ones included."""
    rows = []
    for projection, names in by_projection(selection.grids).items():
        layers: dict[int, list[str]] = {}
        for name in names:
            layers.setdefault(layer_index(name), []).append(name)
        rows += [LayerRow(projection, layer, *_blocks(selection, group)) for layer, group in sorted(layers.items())]
    return rows


def share_rows(selection: BlockSelection) -> list[ShareRow]:
    """Each projection's part of the trained weights, and of the targeted ones."""
    all_weights = sum(grid.num_blocks * grid.block_numel for grid in selection.grids.values())
    rows = []
    for projection, names in by_projection(selection.grids).items():
        trained = sum(len(selection.block_indices.get(name, ())) * selection.grids[name].block_numel for name in names)
        weights = sum(selection.grids[name].num_blocks * selection.grids[name].block_numel for name in names)
        shares = trained / selection.trainable_parameters, weights / all_weights
        rows.append(ShareRow(projection, *_blocks(selection, names), trained, weights, *shares))
    return rows


def score_rows(scores: Mapping[str, Tensor], selection: BlockSelection) -> list[ScoreRow]:
    """A histogram of each projection's scores, over the same intervals; the cut lies between two of them.

    The intervals have one width, or one ratio of their ends where the scores need a logarithmic axis. Blocks with a
    score of 0, which have no place on it, then come first in an interval [0, 0).

    Args:
        scores: module name -> [R, C], at least 0, as `select_blocks` took them.
        selection: what was chosen from them.

    Raises:
        SMTError: the scores are of other modules or grids than the selection.
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
    """The lowest score of a trained block."""
    return min(
        float(scores[name][tuple(indices.T)].min()) for name, indices in selection.block_indices.items() if len(indices)
    )


def is_logarithmic(scores: Mapping[str, Tensor], selection: BlockSelection) -> bool:
    """Whether the scores need a logarithmic axis, and the cut has a place on it."""
    values = _all(scores)
    return cut(scores, selection) > 0 and values.max() > LOGARITHMIC_FROM * np.median(values[values > 0])


def write_csv(rows: Sequence[NamedTuple], path: str | Path) -> None:
    """Write rows of one kind as CSV (UTF-8, field names first), atomically.

    Raises:
        SMTError: there is no row.
    """
    if not rows:
        raise SMTError(f"no row to write to {path}: expected at least one.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    write_text(Path(path), text.getvalue())


def _blocks(selection: BlockSelection, names: Iterable[str]) -> tuple[int, int]:
    """Trained blocks of some modules, and all their blocks."""
    names = list(names)
    trained = sum(len(selection.block_indices.get(name, ())) for name in names)
    return trained, sum(selection.grids[name].num_blocks for name in names)


def _chosen(values: np.ndarray, selection: BlockSelection, name: str) -> np.ndarray:
    """The values of a module's trained blocks."""
    indices = selection.block_indices.get(name)
    return values[:0].ravel() if indices is None else values[tuple(indices.T.numpy())]


def _all(scores: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([score.double().flatten().numpy() for score in scores.values()])


def _edges(values: np.ndarray, cut: float, logarithmic: bool) -> list[float]:
    """Ends of about `BINS` intervals, of one width or one ratio, that cover all values (but 0) and meet at the cut."""
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
            f"{expected.get(name)}. Give the scores that the blocks were chosen from."
        )
