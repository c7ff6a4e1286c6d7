"""The picture of a study: what each arm learned, and what it forgot."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.study import Arm, Study

COLOUR, NEUTRAL = "#4361ee", "#8d99ae"
GENERAL = "forgetting", ("general text",)


def draw(study: Study, results: dict[Arm, list[dict]], path: Path) -> None:
    """Draw every seed as a dot and their mean as a bar: the tuned measure on the left, what was forgotten on the right.

    Forgetting is the rise of the loss on general text. If the untuned model is not an arm, the loss itself is drawn.
    """
    done = {arm: found for arm, found in results.items() if found}
    protocol = PROTOCOLS[study.task]
    sets = protocol.sets or tuple(next(iter(done.values()))[0]["means"][protocol.measure])
    untuned = next((_means(found, *GENERAL)[0] for arm, found in done.items() if arm.method == "none"), None)
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(done)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, done, f"{protocol.measure} on {' and '.join(sets)}", protocol.measure, sets)
    title = "loss on general text" if untuned is None else "forgotten: rise of the loss on general text"
    _bars(right, done, title, *GENERAL, above=untuned or 0.0)
    left.set_yticks(range(len(done)), [arm.label for arm in done])
    left.invert_yaxis()
    figure.savefig(path, dpi=120)


def _bars(
    axis: Axes,
    done: dict[Arm, list[dict]],
    title: str,
    measure: str,
    sets: tuple[str, ...],
    above: float = 0.0,
) -> None:
    for place, (arm, found) in enumerate(done.items()):
        values = [value - above for value in _means(found, measure, sets)]
        axis.barh(place, mean(values), color=NEUTRAL if arm.method == "none" else COLOUR, alpha=0.6)
        axis.plot(values, [place] * len(values), ".", color="black")
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _means(found: list[dict], measure: str, sets: tuple[str, ...]) -> list[float]:
    """Return the mean of a measure over some sets, for each seed."""
    return [mean(result["means"][measure][name] for name in sets) for result in found]
