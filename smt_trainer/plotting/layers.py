"""The trained layers of each projection (SMT, figure 4)."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.plotting.style import COLUMN_WIDTH, PAGE_WIDTH, RULE, drawing, model_name, shades, strips
from smt_trainer.plotting.tables import layer_rows
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS_A_STRIP = 32
# In inches: edge of a cell, labels of a strip, margin beside them, a line of the title; and its letters per inch.
CELL, LABELS, MARGIN, LINE, LETTERS = 0.19, 0.22, 0.2, 0.13, 16


def plot_layers(selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """Draw the trained layers, as in figure 4 of the SMT paper: one cell for each projection in each layer.

    A cell's number counts its trained blocks; its shade shows their share of its blocks. Frozen cells are white with a
    dot. A layer without such a target has no cell.

    Args:
        selection: what to draw; `layer_rows` gives the same data as rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: matplotlib is not installed, or the path has another ending.
    """
    rows = layer_rows(selection)
    projections = list(dict.fromkeys(row.projection for row in rows))
    cells = {(row.projection, row.layer): row for row in rows}
    parts = strips(sorted({row.layer for row in rows}), LAYERS_A_STRIP)
    most = max(row.trained / row.blocks for row in rows)
    width = min(PAGE_WIDTH, max(COLUMN_WIDTH, len(parts[0]) * CELL + MARGIN + max(map(len, projections)) / LETTERS))
    counts = {name: [row.trained for row in rows if row.projection == name] for name in projections}
    frozen = ", ".join(f"{name} {each.count(0)} of {len(each)}" for name, each in counts.items())
    lines = [
        line
        for text in (
            f"Trained blocks in each layer of {model_name(selection)} (shade: share, up to {most:.0%})",
            f"frozen layers (·): {frozen}",
        )
        for line in textwrap.wrap(text, int(width * LETTERS))
    ]
    height = len(parts) * (len(projections) * CELL + LABELS) + len(lines) * LINE + LABELS
    with drawing(path, width, height) as figure:
        axes = figure.subplots(len(parts), squeeze=False)[:, 0]
        for axis, layers in zip(axes, parts, strict=True):
            grid = [[cells.get((projection, layer)) for layer in layers] for projection in projections]
            _heat(axis, grid, most)
            axis.set_xticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
            axis.set_yticks(np.arange(len(projections)) + 0.5, projections)
            axis.set(xlim=(0, len(parts[0])), ylim=(len(projections), 0))
            axis.tick_params(length=0, pad=2)
            axis.spines[:].set_visible(False)
        axes[-1].set_xlabel("layer")
        figure.suptitle("\n".join(lines), x=0.01, ha="left", size=7.5)
    return figure


def _heat(axis: Axes, grid: list, most: float) -> None:
    """Draw one strip: a coloured cell with its number for each row of the table."""
    shares = np.array([[np.nan if row is None else row.trained / row.blocks for row in line] for line in grid])
    axis.pcolormesh(
        shares, cmap=shades().with_extremes(under="white"), vmin=np.nextafter(0, 1), vmax=most, edgecolors=RULE, lw=0.4
    )
    for (vertical, horizontal), share in np.ndenumerate(shares):
        if not np.isnan(share):
            number = grid[vertical][horizontal].trained
            axis.text(
                horizontal + 0.5,
                vertical + 0.5,
                f"{number}" if number else "·",
                ha="center",
                va="center",
                size=6 if number < 1000 else 4.5,
                color="white" if share > 0.4 * most else "black",
            )
