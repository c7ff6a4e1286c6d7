"""The picture of a study: what each arm learned, and what it forgot."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.studies.parts.outcomes import Outcomes
from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.study import Arm, Study

COLOUR, NEUTRAL = "#4361ee", "#8d99ae"
GENERAL = "forgetting", ("general text",)


def draw(study: Study, outcomes: Outcomes, path: Path) -> None:
    """Draw every seed as a dot and their mean as a bar: the tuned measure on the left, what was forgotten on the right.

    Forgetting is the rise of the loss on general text. Without the untuned model, the loss itself is drawn.
    """
    arms, protocol = list(outcomes.results), PROTOCOLS[study.task]
    sets = protocol.sets or tuple(name for measure, name in outcomes.columns if measure == protocol.measure)
    untuned = next((_means(outcomes, arm, *GENERAL)[0] for arm in arms if arm.method == "none"), None)
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, outcomes, f"{protocol.measure} on {' and '.join(sets)}", protocol.measure, sets)
    title = "loss on general text" if untuned is None else "forgotten: rise of the loss on general text"
    _bars(right, outcomes, title, *GENERAL, above=untuned or 0.0)
    left.set_yticks(range(len(arms)), [arm.label for arm in arms])
    left.invert_yaxis()
    figure.savefig(path, dpi=120)


def _bars(
    axis: Axes,
    outcomes: Outcomes,
    title: str,
    measure: str,
    sets: tuple[str, ...],
    above: float = 0.0,
) -> None:
    for place, arm in enumerate(outcomes.results):
        values = [value - above for value in _means(outcomes, arm, measure, sets)]
        axis.barh(place, mean(values), color=NEUTRAL if arm.method == "none" else COLOUR, alpha=0.6)
        axis.plot(values, [place] * len(values), ".", color="black")
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _means(outcomes: Outcomes, arm: Arm, measure: str, sets: tuple[str, ...]) -> list[float]:
    """Return the mean of a measure over some sets, for each seed."""
    return [mean(each) for each in zip(*(outcomes.means(arm, measure, name) for name in sets), strict=True)]
