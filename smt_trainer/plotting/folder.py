"""Draw all pictures of a selection, each with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from smt_trainer.plotting.block_map import plot_selection
from smt_trainer.plotting.histogram import score_rows
from smt_trainer.plotting.layers import plot_layers
from smt_trainer.plotting.scores import plot_scores
from smt_trainer.plotting.shares import plot_shares
from smt_trainer.plotting.tables import layer_rows, selection_rows, share_rows, write_csv
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    def draw(name: str, plot: Callable[..., Figure], rows: Callable[..., Sequence[NamedTuple]], *contents) -> Path:
        picture = Path(folder, f"{name}{suffix}.png")
        plot(*contents, picture)
        write_csv(rows(*contents), picture.with_suffix(".csv"))
        return picture

    pictures = [
        draw("selection", plot_selection, selection_rows, selection),
        draw("layers", plot_layers, layer_rows, selection),
        draw("shares", plot_shares, share_rows, selection),
    ]
    if scores is not None:
        pictures.append(draw("scores", plot_scores, score_rows, scores, selection))
    return pictures
