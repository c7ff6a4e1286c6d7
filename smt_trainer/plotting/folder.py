"""Draw all pictures of a selection, each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from smt_trainer.plotting.block_map import plot_selection
from smt_trainer.plotting.histogram import score_rows
from smt_trainer.plotting.layers import plot_layers
from smt_trainer.plotting.scores import plot_scores
from smt_trainer.plotting.shares import plot_shares
from smt_trainer.plotting.tables import layer_rows, selection_rows, share_rows, write_csv
from smt_trainer.selection.block_selection import BlockSelection


def plot_all(
    selection: BlockSelection, folder: str | Path, scores: Mapping[str, Tensor] | None = None, suffix: str = ""
) -> list[Path]:
    """Draw the block map, the layers, the shares of the projections and, if there are scores, their distribution.

    Args:
        selection: what to draw.
        folder: where to write `selection.png`, `layers.png`, `shares.png` and `scores.png`, and their `.csv` files.
        scores: module name -> scores [R, C] from which the blocks were chosen.
        suffix: text between each file name and its ending.

    Returns:
        The paths of the pictures.

    Raises:
        SMTError: matplotlib is not installed.
    """
    drawn = {
        "selection": (plot_selection, selection_rows, [selection]),
        "layers": (plot_layers, layer_rows, [selection]),
        "shares": (plot_shares, share_rows, [selection]),
    }
    if scores is not None:
        drawn["scores"] = (plot_scores, score_rows, [scores, selection])
    pictures = []
    for name, (plot, rows, contents) in drawn.items():
        picture = Path(folder, f"{name}{suffix}.png")
        plot(*contents, picture)
        write_csv(rows(*contents), picture.with_suffix(".csv"))
        pictures.append(picture)
    return pictures
