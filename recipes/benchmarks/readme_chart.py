"""Draw the picture of the README: the cost of a training step relative to a step of the frozen model.

python -m recipes.benchmarks.readme_chart --results recipes/benchmarks/results

It shows FLOPs and live memory, which are counted and hence exact. It leaves out step time, whose noise is larger than
the differences between the methods.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.benchmarks.parts.charts import COLOURS, NEUTRAL
from recipes.benchmarks.parts.methods import FLOOR, FULL, SMT

MEASUREMENT, PICTURE = "step-smollm2-135m-fp32.json", "readme.png"
BUDGET = 0.0084
# Method -> its name in the picture, from top to bottom.
SHOWN = {SMT: "SMT", "LoRA": "LoRA", "DoRA": "DoRA", FULL: "full fine-tuning"}
PANELS = {"flops": "FLOPs of a step / frozen model", "live_bytes": "Live memory of a step / frozen model"}


def ratios(results: dict) -> dict[str, dict[str, float]]:
    """Return column of `PANELS` -> name of `SHOWN` -> ratio to the frozen model."""
    rows = {row["method"]: row for row in results["methods"] if row["budget"] in (None, BUDGET)}
    return {
        column: {name: rows[method][column] / rows[FLOOR][column] for method, name in SHOWN.items()}
        for column in PANELS
    }


def draw(results: dict, path: Path) -> Figure:
    """Draw both panels side by side and write the picture."""
    figure = Figure(figsize=(6.75, 2.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (column, numbers) in zip(axes, ratios(results).items(), strict=True):
        bars(axis, numbers)
        axis.set_title(PANELS[column], loc="left", fontsize=9)
    axes[0].set(xlim=(0, 2.1), xticks=[0, 0.5, 1, 1.5, 2])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=200)
    return figure


def bars(axis: Axes, numbers: dict[str, float]) -> None:
    """Draw a bar with its number for each method, SMT highlighted, and a line at the frozen model."""
    colours = [COLOURS[0] if name == SHOWN[SMT] else NEUTRAL for name in numbers]
    drawn = axis.barh(list(numbers), list(numbers.values()), 0.7, color=colours)
    labels = axis.bar_label(drawn, fmt="%.3f", padding=4, fontsize=8.5)
    labels[list(numbers).index(SHOWN[SMT])].set(fontweight="bold", color=COLOURS[0])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.tick_params(labelsize=8.5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def main(words: Sequence[str] | None = None) -> None:
    """Read the measurement and draw the picture into the same folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help=f"folder of {MEASUREMENT}; {PICTURE} is written there"
    )
    folder = parser.parse_args(words).results
    draw(json.loads((folder / MEASUREMENT).read_text(encoding="utf-8")), folder / PICTURE)


if __name__ == "__main__":
    main()
