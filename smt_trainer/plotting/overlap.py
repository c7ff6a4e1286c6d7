"""How soon a selection stops changing as the warm-up gets longer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from smt_trainer.errors import SMTError
from smt_trainer.plotting.style import PAGE_WIDTH, RULE, TRAINED, drawing
from smt_trainer.plotting.tables import OverlapPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches.
HEIGHT = 2.6
COLOURS = (TRAINED, "#2a9d8f", "#e9a23b", "#3f6fb5", "#5b5b5b")
MARKERS, DASHES = "os^Dv", ("-", "--", ":", "-.")


def plot_overlap(points: Sequence[OverlapPoint], path: str | Path | None = None) -> Figure:
    """Draw overlap of selections (left) and rank correlation of scores (right) over the length of the warm-up.

    Each line is the mean over seeds for one score and one comparison; the shade around it is their range. The grey line
    is the overlap expected of random selections of the same size.

    Args:
        points: what to draw; `write_csv` takes the same rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: there are no points, matplotlib is not installed, or the path has another ending.
    """
    if not points:
        raise SMTError("no points to draw: expected at least one OverlapPoint.")
    with drawing(path, PAGE_WIDTH, HEIGHT) as figure:
        overlap, correlation = figure.subplots(1, 2)
        _lines(overlap, points, "jaccard")
        chance = sorted({(point.steps, point.chance) for point in points})
        overlap.plot(*zip(*chance, strict=True), color=RULE, lw=2.5, zorder=0, label="random blocks")
        overlap.set(title="Selected blocks", ylabel="Jaccard index", ylim=(0, 1.02))
        _lines(correlation, points, "rank_correlation")
        correlation.axhline(0, color=RULE, lw=2.5, zorder=0)
        lowest = min(point.rank_correlation for point in points)
        correlation.set(
            title="Scores of all blocks", ylabel="Spearman's rank correlation", ylim=(min(-0.02, lowest), 1.02)
        )
        figure.legend(*overlap.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)
    return figure


def _lines(axis: Axes, points: Sequence[OverlapPoint], what: str) -> None:
    """Draw one line for each score and comparison."""
    scores = list(dict.fromkeys(point.score for point in points))
    others = list(dict.fromkeys(point.against for point in points))
    for score, against in dict.fromkeys((point.score, point.against) for point in points):
        values: dict[int, list[float]] = {}
        for point in sorted(points, key=lambda point: point.steps):
            if (point.score, point.against) == (score, against):
                values.setdefault(point.steps, []).append(getattr(point, what))
        number = scores.index(score)
        colour = COLOURS[number % len(COLOURS)]
        style = DASHES[others.index(against) % len(DASHES)]
        axis.plot(
            list(values),
            [fmean(each) for each in values.values()],
            style,
            marker=MARKERS[number % len(MARKERS)],
            color=colour,
            label=f"{score}, {against}",
        )
        lowest, highest = ([f(each) for each in values.values()] for f in (min, max))
        axis.fill_between(list(values), lowest, highest, color=colour, alpha=0.2, lw=0)
    steps = sorted({point.steps for point in points})
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.set_xlabel("warm-up, optimizer steps")
