"""The numbers behind the pictures of a selection, as rows. Needs no matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from smt_trainer.errors import SMTError
from smt_trainer.files import write_text
from smt_trainer.model.grid import numel
from smt_trainer.model.names import by_projection, expert_index, layer_index
from smt_trainer.selection.block_selection import BlockSelection


class SelectionRow(NamedTuple):
    """One trained block: row `row` and column `column` of its module's grid."""

    module: str
    projection: str
    layer: int
    row: int
    column: int


class LayerRow(NamedTuple):
    """One projection in one layer: its trained blocks and all its blocks; `layer` is -1 outside the layers."""

    projection: str
    layer: int
    trained: int
    blocks: int


class ExpertRow(NamedTuple):
    """One projection of one expert in one layer: its trained blocks and all its blocks."""

    projection: str
    layer: int
    expert: int
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


class OverlapPoint(NamedTuple):
    """How much a selection after a short warm-up has in common with another selection.

    Attributes:
        score: name of the score.
        steps: length of the warm-up, in optimizer steps.
        against: what it is compared with, such as "longest warm-up" or "other seed".
        seed: label of the data order, or of the pair of data orders.
        jaccard: blocks in both selections over blocks in either, 0 to 1.
        chance: the Jaccard index expected of two random selections of this size.
        rank_correlation: Spearman's rank correlation of all blocks' scores, -1 to 1.
    """

    score: str
    steps: int
    against: str
    seed: str
    jaccard: float
    chance: float
    rank_correlation: float


def selection_rows(selection: BlockSelection) -> list[SelectionRow]:
    """List every trained block: projection by projection, in the model's order, row by row."""
    return [
        SelectionRow(name, projection, layer_index(name), *block)
        for projection, names in by_projection(selection.grids).items()
        for name in names
        if name in selection.block_indices
        for block in selection.block_indices[name].tolist()
    ]


def layer_rows(selection: BlockSelection) -> list[LayerRow]:
    """Count the trained blocks of each projection in each of its layers, frozen layers included."""
    rows = []
    for projection, names in by_projection(selection.grids).items():
        layers: dict[int, list[str]] = {}
        for name in names:
            layers.setdefault(layer_index(name), []).append(name)
        rows += [LayerRow(projection, layer, *_blocks(selection, group)) for layer, group in sorted(layers.items())]
    return rows


def expert_rows(selection: BlockSelection) -> list[ExpertRow]:
    """Count the trained blocks of each expert's matrices; none where there are no experts."""
    return [
        ExpertRow(projection, layer_index(name), expert_index(name), *_blocks(selection, [name]))
        for projection, names in by_projection(selection.grids).items()
        for name in names
        if expert_index(name) >= 0
    ]


def share_rows(selection: BlockSelection) -> list[ShareRow]:
    """Return each projection's share of the trained weights and of the targeted weights."""
    all_weights = numel(selection.grids.values())
    rows = []
    for projection, names in by_projection(selection.grids).items():
        trained = sum(len(selection.block_indices.get(name, ())) * selection.grids[name].block_numel for name in names)
        weights = numel(selection.grids[name] for name in names)
        shares = trained / selection.trainable_parameters, weights / all_weights
        rows.append(ShareRow(projection, *_blocks(selection, names), trained, weights, *shares))
    return rows


def write_csv(rows: Sequence[NamedTuple], path: str | Path) -> None:
    """Write rows of one kind as CSV (UTF-8, field names first), atomically.

    Raises:
        SMTError: there are no rows.
    """
    if not rows:
        raise SMTError(f"no rows to write to {path}: expected at least one.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    write_text(Path(path), text.getvalue())


def _blocks(selection: BlockSelection, names: Iterable[str]) -> tuple[int, int]:
    """Count the trained blocks, and all blocks, of some modules."""
    names = list(names)
    trained = sum(len(selection.block_indices.get(name, ())) for name in names)
    return trained, sum(selection.grids[name].num_blocks for name in names)
