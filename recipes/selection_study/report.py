"""The study as `study.json`, `study.md`, pictures and CSV files."""

import json
from pathlib import Path
from statistics import fmean

from recipes.selection_study.overlap import jaccard
from recipes.selection_study.study import Outcomes
from smt_trainer import OverlapPoint, plot_layers, plot_overlap, plot_scores, plot_selection, plot_shares
from smt_trainer.files import write_text
from smt_trainer.plotting import layer_rows, score_rows, selection_rows, share_rows, write_csv


def write_report(outcomes: Outcomes, points: list[OverlapPoint], facts: dict, folder: Path) -> None:
    """Write all files.

    Args:
        outcomes: of `study.run`; pictures are of each score's longest warm-up with the first seed.
        points: of `study.compare`.
        facts: what the run was: model, settings, command, hardware, versions.
        folder: where to.
    """
    chosen = [
        {"score": score, "seed": seed, "steps": steps, "blocks": outcome.selection.blocks_by_projection()}
        for (score, seed, steps), outcome in outcomes.items()
    ]
    results = facts | {"points": [point._asdict() for point in points], "selections": chosen}
    write_text(folder / "study.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "study.md", markdown(outcomes, points, facts))
    plot_overlap(points, folder / "overlap.png")
    write_csv(points, folder / "overlap.csv")
    for score, outcome in longest(outcomes).items():
        scores, selection = outcome.scores, outcome.selection
        for stem, rows in (
            ("selection", selection_rows(selection)),
            ("layers", layer_rows(selection)),
            ("shares", share_rows(selection)),
            ("scores", score_rows(scores, selection)),
        ):
            write_csv(rows, folder / f"{stem}-{score}.csv")
        plot_selection(selection, folder / f"selection-{score}.png")
        plot_layers(selection, folder / f"layers-{score}.png")
        plot_shares(selection, folder / f"shares-{score}.png")
        plot_scores(scores, selection, folder / f"scores-{score}.png")


def longest(outcomes: Outcomes) -> dict:
    """Score -> what it gave after the longest warm-up with the first seed."""
    _, seed, _ = next(iter(outcomes))
    most = max(steps for *_, steps in outcomes)
    return {score: outcomes[score, seed, most] for score in dict.fromkeys(score for score, *_ in outcomes)}


def markdown(outcomes: Outcomes, points: list[OverlapPoint], facts: dict) -> str:
    """The contents of `study.md`."""
    last = longest(outcomes)
    lines = [
        f"# How long a warm-up of {facts['model']} has to be\n",
        "Jaccard index of the chosen blocks and Spearman's rank correlation of all blocks' scores: after few steps "
        "beside the longest warm-up on the same data order, and beside another data order after as many steps (means "
        f"over seeds). Two random selections of this size have an index of {points[0].chance:.3f}.\n",
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
    lines += [f"- `{score}`: {outcome.selection.summary()}" for score, outcome in last.items()]
    names = list(last)
    lines += [
        f"- `{first}` and `{second}`: Jaccard index {jaccard(last[first].selection, last[second].selection):.3f}"
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
