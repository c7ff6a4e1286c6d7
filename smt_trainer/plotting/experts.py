"""Which experts are trained, and how much of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.plotting.style import COLUMN_WIDTH, PAGE_WIDTH, PERCENT, RULE, drawing, model_name, shades
from smt_trainer.plotting.tables import expert_rows
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: the widest cell of an expert, the height of a layer, the title and the labels of a projection, the space
# beside them for the colour bar.
CELL, LAYER, HEADING, BAR = 0.12, 0.09, 0.5, 0.8


def plot_experts(selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """Draw the trained experts of each projection: a cell for each expert of each layer, its shade the share of the
    expert's blocks that is trained.

    Args:
        selection: what to draw; `expert_rows` gives the same data as rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: matplotlib is not installed, or the path has another ending.
    """
    rows = expert_rows(selection)
    projections = list(dict.fromkeys(row.projection for row in rows))
    layers = sorted({row.layer for row in rows})
    experts = max(row.expert for row in rows) + 1
    most = max(row.trained / row.blocks for row in rows)
    width = min(PAGE_WIDTH, max(COLUMN_WIDTH, experts * CELL + BAR))
    height = len(projections) * (len(layers) * LAYER + HEADING) + HEADING
    with drawing(path, width, height) as figure:
        axes = figure.subplots(len(projections), squeeze=False)[:, 0]
        for axis, projection in zip(axes, projections, strict=True):
            shares = np.full((len(layers), experts), np.nan)
            mine = [row for row in rows if row.projection == projection]
            for row in mine:
                shares[layers.index(row.layer), row.expert] = row.trained / row.blocks
            axis.pcolormesh(
                np.arange(experts + 1),
                np.arange(len(layers) + 1),
                shares,
                cmap=shades(),
                vmin=np.nextafter(0, 1),
                vmax=most,
            )
            trained = sum(row.trained > 0 for row in mine)
            axis.set_title(f"{projection}: {trained:,} of {len(mine):,} matrices")
            axis.set(ylim=(len(layers), 0), ylabel="layer")
            axis.set_yticks([0.5, len(layers) - 0.5], [str(layers[0]), str(layers[-1])])
            axis.tick_params(length=0)
            axis.spines[:].set(visible=True, color=RULE)
        axes[-1].set_xlabel("expert")
        bar = figure.colorbar(axes[0].collections[0], ax=list(axes), format=PERCENT, ticks=[0, most])
        bar.set_label("share trained")
        bar.outline.set_visible(False)
        figure.suptitle(f"Trained experts of {model_name(selection)}", x=0.01, ha="left")
    return figure
