"""The report of the study: `study.json`, `study.md`, pictures and CSV files."""

import json
from pathlib import Path
from statistics import fmean

from recipes.selection_study.study import Outcomes
from smt_trainer import BlockScores, Overlap, plot_overlap
from smt_trainer.files import write_text
from smt_trainer.plotting import OverlapPoint, plot_all, write_csv


def write_report(outcomes: Outcomes, points: list[OverlapPoint], facts: dict, folder: Path) -> None:
    """Write all files.

    Args:
        outcomes: from `study.run`. The pictures show each score's longest warm-up with the first seed.
        points: from `study.compare`.
        facts: model, settings, command, hardware and versions of the run.
        folder: folder to write to.
    """
    chosen = [
        {"score": score, "seed": seed, "steps": steps, "blocks": outcome.select().blocks_by_projection()}
        for (score, seed, steps), outcome in outcomes.items()
    ]
    results = facts | {"points": [point._asdict() for point in points], "selections": chosen}
    write_text(folder / "study.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "study.md", markdown(outcomes, points, facts))
    plot_overlap(points, folder / "overlap.png")
    write_csv(points, folder / "overlap.csv")
    for score, outcome in longest(outcomes).items():
        plot_all(outcome.select(), folder, outcome.scores, f"-{score}")


def longest(outcomes: Outcomes) -> dict[str, BlockScores]:
    """Return score -> block scores after the longest warm-up with the first seed."""
    _, seed, _ = next(iter(outcomes))
    most = max(steps for *_, steps in outcomes)
    return {score: outcomes[score, seed, most] for score in dict.fromkeys(score for score, *_ in outcomes)}


def markdown(outcomes: Outcomes, points: list[OverlapPoint], facts: dict) -> str:
    """Return the text of `study.md`."""
    last = longest(outcomes)
    lines = [
        f"# How long a warm-up of {facts['model']} must be\n",
        "Jaccard index of the chosen blocks and Spearman's rank correlation of all blocks' scores. Each row compares a "
        "warm-up with the longest one on the same data order, and with one of equal length on another data order "
        f"(means over seeds). Two random selections of this size have an index of {points[0].chance:.3f}.\n",
        "| score | steps | longest: Jaccard | Spearman | other seed: Jaccard | Spearman |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for score, steps in sorted({(point.score, point.steps) for point in points}):
        cells = [
            _mean(getattr(point, what) for point in points if point[:3] == (score, steps, against))
            for against in ("longest warm-up", "other seed")
            for what in ("jaccard", "rank_correlation")
        ]
        lines.append(f"| `{score}` | {steps} | " + " | ".join(cells) + " |")
    lines += ["", "![Overlap](overlap.png)\n", "## After the longest warm-up, first seed\n"]
    lines += [f"- `{score}`: {outcome.select().summary()}" for score, outcome in last.items()]
    names = list(last)
    lines += [
        f"- `{first}` and `{second}`: Jaccard index {Overlap.of(last[first], last[second]).jaccard:.3f}"
        for place, first in enumerate(names)
        for second in names[place + 1 :]
    ]
    for score in names:
        pictures = (f"![{stem} of {score}]({stem}-{score}.png)" for stem in ("selection", "layers", "shares", "scores"))
        lines += ["", f"### `{score}`\n", *pictures]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _mean(values) -> str:
    values = list(values)
    return f"{fmean(values):.3f}" if values else ""


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
