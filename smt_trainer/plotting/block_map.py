"""The block map: where the trained blocks lie in each weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smt_trainer.model.names import by_projection, layer_index
from smt_trainer.plotting.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    PERCENT,
    block_shapes,
    drawing,
    model_name,
    shades,
    strips,
)
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Layers in a strip: few, in large tiles, if two strips hold all layers; else many.
FEW, MANY = 16, 32
# In inches: the widest tile, the title above a projection, the labels below a strip, the text above and below the
# figure, the colour bar with its labels, and the smallest visible cell.
WIDEST_TILE, TITLE, LAYERS, HEADING, BAR, CELL = 0.8, 0.22, 0.17, 0.22, 0.65, 0.012
# In tile widths: the gap between two tiles, and the least and greatest height of a drawn weight.
GAP, FLATTEST, TALLEST = 0.1, 0.25, 4.0


def plot_selection(selection: BlockSelection, path: str | Path | None = None) -> Figure:
    """Draw the block map: for each projection, the weights of all layers side by side, with trained blocks filled.

    A weight is drawn as wide as its in features and as high as its out features. If its blocks are too small to see, a
    cell stands for several neighbours, and its shade for the share of them that is trained.

    Args:
        selection: what to draw; `selection_rows` gives the same data as rows.
        path: file to write, if any (PNG, PDF or SVG, by its ending).

    Returns:
        The matplotlib figure.

    Raises:
        SMTError: matplotlib is not installed, or the path has another ending.
    """
    projections = by_projection(selection.grids)
    most_layers = max(map(len, projections.values()))
    rows = {name: strips(names, FEW if most_layers <= 2 * FEW else MANY) for name, names in projections.items()}
    across = max(len(strip) for parts in rows.values() for strip in parts) * (1 + GAP) - GAP
    tile = min(WIDEST_TILE, (PAGE_WIDTH - BAR) / across)
    sizes = _tile_sizes(selection)
    cells = {name: trained_share(selection, name, *(int(edge * tile / CELL) for edge in sizes[name])) for name in sizes}
    depths = {name: [max(sizes[module][0] for module in strip) for strip in parts] for name, parts in rows.items()}
    grouped = any(image.shape != selection.grids[name].shape for name, image in cells.items())
    width = max(COLUMN_WIDTH, across * tile + (BAR if grouped else 0.1))
    height = 2 * HEADING + sum(TITLE + sum(depth * tile + LAYERS for depth in each) for each in depths.values())
    with drawing(path, width, height) as figure:
        figure.set_layout_engine("none")
        most = max(image.max() for image in cells.values())
        top = height - HEADING
        for projection, parts in rows.items():
            top -= TITLE
            for strip, depth in zip(parts, depths[projection], strict=True):
                bottom = top - depth * tile
                axis = figure.add_axes((0.01, bottom / height, across * tile / width, depth * tile / height))
                if strip is parts[0]:
                    axis.set_title(_title(selection, projection, projections[projection]), pad=3)
                for place, name in enumerate(strip):
                    _tile(axis, name, cells[name], sizes[name], place * (1 + GAP), most)
                centres = [place * (1 + GAP) + sizes[name][1] / 2 for place, name in enumerate(strip)]
                axis.set_xticks(centres, [str(layer_index(name)) for name in strip])
                axis.set(xlim=(0, across), ylim=(depth, 0), yticks=[], aspect="auto")
                axis.tick_params(length=0, pad=1.5)
                axis.spines[:].set_visible(False)
                top = bottom - LAYERS
        reading = "layer; in each tile, in features run right and out features down"
        figure.text(0.01, 0.06 / height, f"{reading}, a cell is several blocks" if grouped else reading)
        figure.suptitle(
            f"{selection.num_blocks:,} trained block{'s' * (selection.num_blocks > 1)} of {block_shapes(selection)} "
            f"weights, {selection.fraction_of_model:.2%} of {model_name(selection)}",
            x=0.01,
            y=1 - 0.06 / height,
            ha="left",
        )
        if grouped:
            length = min(1.2, height - 4 * HEADING)
            place = (1 - (BAR - 0.1) / width, 1 - (HEADING + TITLE + length) / height, 0.1 / width, length / height)
            bar = figure.colorbar(figure.axes[-1].images[0], figure.add_axes(place), format=PERCENT, ticks=[0, most])
            bar.set_label("share trained", labelpad=-4)
            bar.outline.set_visible(False)
    return figure


def trained_share(selection: BlockSelection, name: str, most_rows: int, most_columns: int) -> np.ndarray:
    """Return the share of trained blocks in each cell of a module's grid, as [r, c].

    A cell is one block if the grid [R, C] has at most `most_rows` rows and `most_columns` columns. Otherwise it is a
    rectangle of neighbours, so that r <= most_rows and c <= most_columns.
    """
    shape, limits = selection.grids[name].shape, (most_rows, most_columns)
    steps = [math.ceil(length / max(1, limit)) for length, limit in zip(shape, limits, strict=True)]
    starts = [np.arange(0, length, step) for length, step in zip(shape, steps, strict=True)]
    rows, columns = (np.diff(start, append=length) for start, length in zip(starts, shape, strict=True))
    trained = np.zeros((len(rows), len(columns)))
    if name in selection.block_indices:
        np.add.at(trained, tuple((selection.block_indices[name] // steps).T), 1)
    return trained / np.outer(rows, columns)


def _tile_sizes(selection: BlockSelection) -> dict[str, tuple[float, float]]:
    """Return module -> height and width of its tile; the widest weight of each projection is 1 wide."""
    sizes = {}
    for names in by_projection(selection.grids).values():
        widest = max(selection.grids[name].in_features for name in names)
        for name in names:
            out, into = selection.grids[name].weight_shape
            sizes[name] = min(max(out / widest, FLATTEST), TALLEST), into / widest
    return sizes


def _title(selection: BlockSelection, projection: str, names: list[str]) -> str:
    trained = sum(len(selection.block_indices.get(name, ())) for name in names)
    blocks = sum(selection.grids[name].num_blocks for name in names)
    return f"{projection}: {trained:,} of {blocks:,} blocks"


def _tile(axis: Axes, name: str, cells: np.ndarray, size: tuple[float, float], left: float, most: float) -> None:
    """Draw one weight; the image carries the module's name."""
    height, width = size
    axis.imshow(
        cells,
        shades(),
        vmin=np.nextafter(0, 1),
        vmax=most,
        extent=(left, left + width, height, 0),
        interpolation="nearest",
        gid=name,
    )
