"""How the trained weights are divided among the projections (SMT, figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.plotting.style import COLUMN_WIDTH, FROZEN, PERCENT, TRAINED, drawing
from smt_trainer.plotting.tables import share_rows
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In distances between projections.
THICKNESS = 0.38
# In inches: a projection's two bars, and all labels.
PAIR, LABELS = 0.36, 0.75


def plot_shares(selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """Draw each projection's share of the trained weights, as in figure 5 of the SMT paper, above its share of the
    targets.

    If the selection preferred no projection, both bars of each projection would have the same length.

    Args:
        selection: what to draw; `share_rows` gives the same data as rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: matplotlib is not installed, or the path has another ending.
    """
    rows = share_rows(selection)
    places = np.arange(len(rows))
    with drawing(path, COLUMN_WIDTH, PAIR * len(rows) + LABELS) as figure:
        axis = figure.subplots()
        for offset, label, colour, shares in (
            (-THICKNESS / 2, "trained weights", TRAINED, [(row.share_of_trained, row.trained) for row in rows]),
            (THICKNESS / 2, "targeted weights", FROZEN, [(row.share_of_targets, row.blocks) for row in rows]),
        ):
            lengths = [share for share, _ in shares]
            bars = axis.barh(places + offset, lengths, THICKNESS, label=label, color=colour, edgecolor="black", lw=0.4)
            axis.bar_label(bars, [f"{share:.1%} ({blocks:,})" for share, blocks in shares], padding=2, size=6)
        axis.set_yticks(places, [row.projection for row in rows])
        axis.invert_yaxis()
        end = 1.35 * max(max(row.share_of_trained, row.share_of_targets) for row in rows)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlim(0, end)
        axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= min(1, end)])
        axis.xaxis.set_major_formatter(PERCENT)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("share of all (in brackets: blocks)")
        figure.legend(loc="outside upper left", ncols=2)
    return figure
