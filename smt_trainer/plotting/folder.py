"""Draw all pictures of a selection, each with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from smt_trainer.model.names import expert_index
from smt_trainer.plotting.block_map import plot_selection
from smt_trainer.plotting.experts import plot_experts
from smt_trainer.plotting.histogram import score_rows
from smt_trainer.plotting.layers import plot_layers
from smt_trainer.plotting.scores import plot_scores
from smt_trainer.plotting.shares import plot_shares
from smt_trainer.plotting.tables import expert_rows, layer_rows, selection_rows, share_rows, write_csv
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_all(
    selection: BlockSelection, folder: str | Path, scores: Mapping[str, Tensor] | None = None, suffix: str = ""
) -> list[Path]:
    """Draw the block map, the layers, the shares of the projections, the experts if there are any, and, if there are
    scores, their distribution. The block map leaves out the experts, of which there may be thousands.

    Args:
        selection: what to draw.
        folder: where to write `selection.png`, `layers.png`, `shares.png`, `experts.png` and `scores.png`, and their
            `.csv` files.
        scores: module name -> scores [R, C] from which the blocks were chosen.
        suffix: text between the name of each file and its ending.

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

    pictures = []
    if (others := _without_experts(selection)) is not None:
        pictures.append(draw("selection", plot_selection, selection_rows, others))
    pictures.append(draw("layers", plot_layers, layer_rows, selection))
    pictures.append(draw("shares", plot_shares, share_rows, selection))
    if expert_rows(selection):
        pictures.append(draw("experts", plot_experts, expert_rows, selection))
    if scores is not None:
        pictures.append(draw("scores", plot_scores, score_rows, scores, selection))
    return pictures


def _without_experts(selection: BlockSelection) -> BlockSelection | None:
    """Return the other blocks of a selection; None if there are none."""
    grids = {name: grid for name, grid in selection.grids.items() if expert_index(name) < 0}
    block_indices = {name: found for name, found in selection.block_indices.items() if name in grids}
    return replace(selection, grids=grids, block_indices=block_indices) if block_indices else None
