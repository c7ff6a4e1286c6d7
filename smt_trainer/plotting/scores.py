"""The distribution of the scores, and where the budget cuts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from smt_trainer.plotting.histogram import ScoreRow, cut, is_logarithmic, score_rows
from smt_trainer.plotting.style import COLUMN_WIDTH, FROZEN, TRAINED, drawing
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches: a projection's panel, and the labels of the figure.
PANEL, LABELS = 0.8, 0.6


def plot_scores(scores: Mapping[str, Tensor], selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """Draw a histogram of each projection's scores, with the trained blocks filled and the cut marked.

    The cut is the lowest score of a trained block. The axis of block counts is logarithmic. The axis of scores is
    logarithmic if the highest score is more than ten times the median positive score; the title then counts the blocks
    with a score of 0.

    Args:
        scores: module name -> [R, C], as passed to `select_blocks`.
        selection: the blocks chosen from them; `score_rows` gives the same data as rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: the scores and the selection have different modules or grids, matplotlib is not installed, or the
            path has another ending.
    """
    panels: dict[str, list[ScoreRow]] = {}
    for row in score_rows(scores, selection):
        panels.setdefault(row.projection, []).append(row)
    lowest = cut(scores, selection)
    above = sum(int((score >= lowest).sum()) for score in scores.values())
    blocks = sum(score.numel() for score in scores.values())
    with drawing(path, COLUMN_WIDTH, PANEL * len(panels) + LABELS) as figure:
        axes = figure.subplots(len(panels), squeeze=False, sharex=True, sharey=True)[:, 0]
        for axis, (projection, rows) in zip(axes, panels.items(), strict=True):
            _histogram(axis, rows)
            axis.axvline(lowest, color="black", lw=0.8, ls="--")
            axis.set_title(_title(projection, rows), size=7, pad=3)
        axes[0].set_yscale("log")
        if is_logarithmic(scores, selection):
            axes[0].set_xscale("log")
        axes[0].set_ylim(bottom=0.7)
        figure.supylabel("blocks", size=7)
        axes[-1].set_xlabel(f"score of a block ({selection.config.score})")
        figure.suptitle(f"Cut at {lowest:.3g}, reached by {above:,} of {blocks:,} blocks", x=0.01, ha="left")
    return figure


def _bars(rows: list[ScoreRow]) -> list[ScoreRow]:
    """Return the rows of intervals with a width, without the row of zeros."""
    return [row for row in rows if row.high > 0]


def _histogram(axis: Axes, rows: list[ScoreRow]) -> None:
    bars = _bars(rows)
    edges = [bars[0].low, *(row.high for row in bars)]
    axis.stairs([row.blocks for row in bars], edges, fill=True, color=FROZEN, baseline=0)
    axis.stairs([row.trained for row in bars], edges, fill=True, color=TRAINED, baseline=0)
    axis.stairs([row.blocks for row in bars], edges, color="black", lw=0.5, baseline=0)


def _title(projection: str, rows: list[ScoreRow]) -> str:
    trained, blocks = (sum(getattr(row, what) for row in rows) for what in ("trained", "blocks"))
    zeros = sum(row.blocks for row in rows if row.high == 0)
    return f"{projection}: {trained:,} of {blocks:,} trained" + (f", {zeros:,} with a score of 0" if zeros else "")
