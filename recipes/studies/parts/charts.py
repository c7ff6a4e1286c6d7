"""The picture of a study: what each arm learned beside what it forgot."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.study import Arm, Study

COLOUR, NEUTRAL = "#4361ee", "#8d99ae"


def draw(study: Study, results: dict[Arm, list[dict]], path: Path) -> None:
    """Draw every seed as a dot and their mean as a bar: the tuned measure on the left, general text on the right."""
    done = {arm: found for arm, found in results.items() if found}
    protocol = PROTOCOLS[study.task]
    sets = protocol.sets or tuple(next(iter(done.values()))[0]["means"][protocol.measure])
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(done)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, done, f"{protocol.measure} on {' and '.join(sets)}", protocol.measure, sets)
    _bars(right, done, "loss on general text (forgetting)", "forgetting", ("general text",))
    left.set_yticks(range(len(done)), [arm.label for arm in done])
    left.invert_yaxis()
    figure.savefig(path, dpi=120)


def _bars(axis: Axes, done: dict[Arm, list[dict]], title: str, measure: str, sets: tuple[str, ...]) -> None:
    for place, (arm, found) in enumerate(done.items()):
        values = [mean(result["means"][measure][name] for name in sets) for result in found]
        axis.barh(place, mean(values), color=NEUTRAL if arm.method == "none" else COLOUR, alpha=0.6)
        axis.plot(values, [place] * len(values), ".", color="black")
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
