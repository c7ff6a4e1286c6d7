"""Charts of the measurements of a training step."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.benchmarks.parts.methods import SMT
from recipes.parts.markdown import percent

COLOURS = ("#4361ee", "#b5179e", "#4cc9f0", "#f72585")
NEUTRAL = "#8d99ae"


def draw(results: dict, path: Path) -> None:
    """Draw time and memory of all methods, and below them SMT's curves if they were measured."""
    curves = results.get("curves")
    figure = Figure(figsize=(11, 9 if curves else 5), layout="constrained")
    axes = figure.subplots(2 if curves else 1, 2, squeeze=False, height_ratios=[5, 3] if curves else None)
    timer = results["timer"]
    bars(axes[0, 0], results["methods"], lambda row: row["to_floor"][timer])
    axes[0, 0].axvline(1, color="black", linewidth=0.8)
    axes[0, 0].set_title(f"Step time / floor ({timer})", loc="left", fontsize=10)
    bars(axes[0, 1], results["methods"], lambda row: {"median": row["peak_bytes"] / 2**20})
    axes[0, 1].set_title("Peak memory above the model alone, MiB", loc="left", fontsize=10)
    axes[0, 1].tick_params(labelleft=False)
    if curves:
        budgets = [100 * row["budget"] for row in curves["by_budget"]]
        curve(axes[1, 0], budgets, curves["by_budget"], curves["floor"], timer)
        own = [sum(part[timer]["median"] for part in row["own_work"].values()) for row in curves["by_budget"]]
        axes[1, 0].plot(
            budgets, [1 / (1 - share) for share in own], "^-", color=COLOURS[3], label="time, by its own work"
        )
        axes[1, 0].legend(frameon=False, fontsize=8)
        axes[1, 0].set_xscale("log")
        axes[1, 0].set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes[1, 0].minorticks_off()
        axes[1, 0].set_title(f"{SMT} / floor, by budget (% of all parameters)", loc="left", fontsize=10)
        layers = [row["lowest_layer"] for row in curves["by_lowest_layer"]]
        curve(axes[1, 1], layers, curves["by_lowest_layer"], curves["floor"], timer)
        axes[1, 1].set_title(f"{SMT} / floor, by lowest layer with blocks", loc="left", fontsize=10)
    held = ", ".join(filter(None, (results["setting"]["dtype"], results["setting"]["base"])))
    figure.suptitle(f"A training step of {results['shape']}, {held}", fontsize=12)
    figure.savefig(path, dpi=120)


def bars(axis: Axes, rows: list[dict], value) -> None:
    """Draw a bar for each method and budget, grouped by method. `value` returns the median and optionally quartiles."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None))
    height = 0.8 / max(1, len(budgets))
    for row in rows:
        number, place, thickness, colour = value(row), methods.index(row["method"]), 0.8, NEUTRAL
        if row["budget"] is not None:
            index = budgets.index(row["budget"])
            place, thickness, colour = place + (index - (len(budgets) - 1) / 2) * height, height, COLOURS[index % 4]
        axis.barh(place, number["median"], thickness, color=colour)
        if "lower" in number:
            axis.hlines(place, number["lower"], number["upper"], color="black", linewidth=1)
    for index, budget in enumerate(budgets):
        axis.barh(0, 0, color=COLOURS[index % 4], label=percent(budget))
    axis.set_yticks(range(len(methods)), methods)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def curve(axis: Axes, places: list[float], rows: list[dict], floor: dict, timer: str) -> None:
    """Draw time with its quartiles, live memory and FLOPs, all as ratios to the floor."""
    time = [row["to_floor"][timer] for row in rows]
    axis.fill_between(
        places, [each["lower"] for each in time], [each["upper"] for each in time], color=COLOURS[0], alpha=0.2
    )
    axis.plot(places, [each["median"] for each in time], "o-", color=COLOURS[0], label="time")
    for what, label, colour in (("live_bytes", "live memory", COLOURS[1]), ("flops", "FLOPs", COLOURS[2])):
        axis.plot(places, [row[what] / floor[what] for row in rows], "s--", color=colour, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
