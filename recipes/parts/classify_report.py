"""The results of a comparison of classifiers: `results.json` for machines, `results.md` and a picture for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from recipes.parts.bootstrap import difference
from recipes.parts.json_file import write_json
from recipes.parts.markdown import provenance_rows, table
from recipes.parts.measures_of_labels import Measure
from recipes.parts.provenance import peak_memory_bytes, provenance, without_folder
from smt_trainer.files import write_text

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "smt_trainer")
PICTURE = "comparison.png"
COLOUR, NEUTRAL = "#4361ee", "#8d99ae"


@dataclass(frozen=True)
class Outcome:
    """The result of one method.

    Attributes:
        trained: number of trained parameters, the new head included.
        seconds: seconds of training, the warm-up included.
        values: measure -> value on the held-out examples.
        outputs: [N, C], outputs of the trained model for these examples.
        selection, delta_bytes: what SMT and SPSFT chose, and how large the delta is; None for other methods.
        merged_equal: whether the tensors of the merged checkpoint equal those of the trained model, bit for bit.
        merged_moved: largest difference between the outputs of the two. Even with equal tensors it need not be 0: how a
            product with one output (a regression's) is rounded depends on where the weight lies in memory.
    """

    method: str
    label: str
    trained: int
    rate: float
    seconds: float
    steps: int
    values: dict[str, float]
    outputs: np.ndarray
    selection: str | None = None
    delta_bytes: int | None = None
    merged_equal: bool | None = None
    merged_moved: float | None = None


@dataclass(frozen=True)
class Report:
    """The results of a run. Differences are to the first outcome, measured with `labels` [N]."""

    task: str
    model: str
    data: str
    evaluated_on: str
    classes: list[str]
    train_examples: int
    labels: np.ndarray
    measures: Mapping[str, Measure]
    outcomes: list[Outcome]
    seed: int
    total_seconds: float
    processor_seconds: float

    def to_dict(self) -> dict:
        """Return the contents of `results.json`."""
        return {
            "task": self.task,
            "model": without_folder(self.model),
            "data": self.data,
            "evaluated_on": self.evaluated_on,
            "classes": self.classes,
            "train_examples": self.train_examples,
            "test_examples": len(self.labels),
            **{each.method: self._one(each) for each in self.outcomes},
            "total_seconds": self.total_seconds,
            "processor_seconds": self.processor_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "seed": self.seed,
            **provenance("recipes.classify", PACKAGES),
        }

    def _one(self, outcome: Outcome) -> dict:
        values = {name: value for name, value in vars(outcome).items() if name not in ("method", "outputs")}
        return values | {"difference": {name: self._difference(name, outcome) for name in self.measures}}

    def _difference(self, measure: str, outcome: Outcome) -> tuple[float, float, float]:
        reference = self.outcomes[0].outputs
        return difference(self.measures[measure], outcome.outputs, reference, self.labels, self.seed)


def write_report(report: Report, output: Path) -> None:
    """Write all three files into `output` and print the table."""
    results = report.to_dict()
    text = markdown(report, results)
    write_json(output / "results.json", results)
    write_text(output / "results.md", text)
    draw(report, output / PICTURE)
    tqdm.write(text)


def markdown(report: Report, results: dict) -> str:
    """Return the text of `results.md`: each method's measures, and its difference from the first method."""
    names = list(report.measures)
    main, first = names[0], report.outcomes[0]
    rows = []
    for each in report.outcomes:
        found = results[each.method]
        equal = {None: "", True: "yes", False: "NO"}[each.merged_equal]
        if each.merged_moved:
            equal += f", outputs to {each.merged_moved:.1g}"
        gap = "" if each is first else _interval(main, found["difference"][main])
        cost = [f"{each.trained:,}", f"{each.rate:g}", f"{each.seconds:.1f}"]
        rows.append([each.label, *cost, *(shown(name, each.values[name]) for name in names), gap, equal])
    header = ["method", "trained", "rate", "seconds", *names, f"{main}, to {first.label}", "merged equal"]
    lines = [
        f"# {results['model']} on the {report.task} task: {len(report.outcomes)} ways to fine-tune\n",
        f"Data: {report.data}. {report.train_examples:,} examples to train, {len(report.labels):,} "
        f"{report.evaluated_on} examples to measure, {len(report.classes) or 'no'} classes; {first.steps} steps of "
        "each method. Trained parameters include the new head; rows, blocks and adapters get the same budget.\n",
        table("|".join(header), rows),
        f"In % but for losses and errors. The interval holds 95 % of {main}'s differences over examples drawn anew; it "
        "says nothing about other seeds.\n",
        f"![{main}]({PICTURE})\n",
        table(
            "|",
            [
                *([each.label, each.selection] for each in report.outcomes if each.selection),
                *(
                    [f"delta, {each.label}", f"{each.delta_bytes / 2**20:.2f} MiB"]
                    for each in report.outcomes
                    if each.delta_bytes
                ),
                ["whole run", f"{report.total_seconds:.0f} s; {report.processor_seconds:.0f} s of the processor"],
                ["peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB"],
                *provenance_rows(results),
            ],
        ),
    ]
    return "\n".join(lines)


def is_loss(measure: str) -> bool:
    """Tell whether smaller values are better."""
    return "loss" in measure or "error" in measure


def shown(measure: str, value: float) -> str:
    """Return a loss with three digits, another measure in %."""
    return f"{value:.3f}" if is_loss(measure) else f"{100 * value:.1f}"


def _interval(measure: str, found: tuple[float, float, float]) -> str:
    value, low, high = found if is_loss(measure) else (100 * each for each in found)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def draw(report: Report, path: Path) -> None:
    """Draw the first measure of each method as a bar; SMT's and SPSFT's in colour."""
    main = next(iter(report.measures))
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(report.outcomes)), layout="constrained")
    axis = figure.subplots()
    for place, each in enumerate(report.outcomes):
        value = 100 * each.values[main]
        axis.barh(place, value, color=COLOUR if each.selection else NEUTRAL, alpha=0.8)
        axis.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(report.outcomes)), [f"{each.label} ({each.trained:,})" for each in report.outcomes])
    axis.invert_yaxis()
    axis.set_title(f"{main}, % (trained parameters)", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
