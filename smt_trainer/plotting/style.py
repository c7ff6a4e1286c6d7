"""One style for all pictures: widths of a two-column page, type legible at that size, tones that survive greyscale."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically
from smt_trainer.model.hub import split_commit
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# In inches.
COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.75
ENDINGS = (".png", ".pdf", ".svg")
FROZEN, PALE, TRAINED, RULE = "#e6e6e6", "#dfa6d2", "#9c1487", "#8d99ae"
PERCENT = "{x:.0%}"
LOOK = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "figure.titlesize": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "savefig.dpi": 300,
    # Type that a journal's checks accept and a reader can search.
    "pdf.fonttype": 42,
}


@contextlib.contextmanager
def drawing(path: str | Path | None, width: float, height: float) -> Generator[Figure]:
    """Yield a figure of a size in inches to draw on; at the end of the context, write it to `path`, if given.

    Raises:
        SMTError: matplotlib is not installed, or `path` does not end in .png, .pdf or .svg.
    """
    if path is not None and Path(path).suffix.lower() not in ENDINGS:
        raise SMTError(f"a picture's path must end in {', '.join(ENDINGS)}, which sets its format; got {path}.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SMTError("plotting needs matplotlib; install it with: pip install 'smt_trainer[plot]'") from error
    with rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        if path is not None:
            kind = Path(path).suffix.lower().removeprefix(".")
            write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format=kind))


def shades() -> Colormap:
    """Return a colour map from pale to dark as the trained share rises; a share of 0 (frozen) has its own tone."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("trained", [PALE, TRAINED]).with_extremes(under=FROZEN)


def strips(items: Sequence, most: int) -> list[Sequence]:
    """Split the items into as few runs of at most `most` items as possible, of nearly equal length."""
    count = -(-len(items) // most)
    length = -(-len(items) // count)
    return [items[start : start + length] for start in range(0, len(items), length)]


def model_name(selection: BlockSelection) -> str:
    """Return the model's name for titles: its name without the revision."""
    return split_commit(selection.base_model)[0] or "the model"


def block_shapes(selection: BlockSelection) -> str:
    """Return the shapes of the blocks in weights, such as '64x64'."""
    return ", ".join(
        "{}x{}".format(*shape) for shape in sorted({grid.block_shape for grid in selection.grids.values()})
    )
