"""Pictures of a selection (matplotlib, from the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically
from smt_trainer.selection import BlockSelection
from smt_trainer.targets import layer_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FROZEN, CHOSEN, GAP = 0.0, 1.0, np.nan
COLOURS = ("#e6e6e6", "#b5179e")


def plot_selection(selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """The block map: for each projection, the weights of all layers side by side with their chosen blocks filled.

    Args:
        selection: what to draw; within a layer's tile, output features run down and input features run right.
        path: file to write as well (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SMTError("plotting needs matplotlib; install it with: pip install 'smt_trainer[plot]'") from error

    projections: dict[str, list[str]] = {}
    for name in selection.grids:
        projections.setdefault(name.rpartition(".")[2], []).append(name)
    figure = Figure(figsize=(11, 0.9 + 1.5 * len(projections)), layout="constrained")
    axes = figure.subplots(len(projections), squeeze=False)[:, 0]
    for axis, (projection, names) in zip(axes, projections.items(), strict=True):
        image, centres = _tiles(selection, names)
        axis.imshow(
            image, cmap=ListedColormap(COLOURS), vmin=FROZEN, vmax=CHOSEN, aspect="auto", interpolation="nearest"
        )
        chosen = sum(len(selection.block_indices.get(name, ())) for name in names)
        total = sum(selection.grids[name].num_blocks for name in names)
        axis.set_title(f"{projection}: {chosen:,} of {total:,} blocks", loc="left", fontsize=10)
        step = max(1, len(names) // 32)
        axis.set_xticks(centres[::step], [str(layer_index(name)) for name in names[::step]], fontsize=8)
        axis.set_yticks([])
        axis.set_ylabel("output", fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[-1].set_xlabel("layer (within each: input features, left to right)", fontsize=9)
    shapes = sorted({"{}x{}".format(*grid.block_shape) for grid in selection.grids.values()})
    figure.suptitle(
        f"{selection.num_blocks:,} trained blocks of {', '.join(shapes)} weights, "
        f"{selection.fraction_of_model:.2%} of {(selection.base_model or 'the model').partition('@')[0]}",
        fontsize=11,
    )
    if path is not None:
        kind = Path(path).suffix.removeprefix(".") or "png"
        write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
    return figure


def _tiles(selection: BlockSelection, names: list[str]) -> tuple[np.ndarray, list[float]]:
    """The modules' grids side by side, a gap between them, and the column at each one's centre."""
    height = max(selection.grids[name].shape[0] for name in names)
    tiles, centres, left = [], [], 0
    for name in names:
        rows, columns = selection.grids[name].shape
        gap = max(1, columns // 6)
        tile = np.full((height, columns + gap), GAP)
        tile[:rows, :columns] = FROZEN
        if name in selection.block_indices:
            tile[tuple(selection.block_indices[name].T.numpy())] = CHOSEN
        tiles.append(tile)
        centres.append(left + (columns - 1) / 2)
        left += columns + gap
    return np.concatenate(tiles, axis=1), centres
