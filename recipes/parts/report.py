"""The results of a run: `results.json` for machines, `results.md` for people."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from recipes.parts.baseline import Beside
from recipes.parts.constant_answers import constant_answers
from recipes.parts.evaluation import Evaluation, paired_gain
from recipes.parts.json_file import write_json
from recipes.parts.markdown import provenance_rows
from recipes.parts.markdown import table as markdown_table
from recipes.parts.measures import gain_text, is_loss, table
from recipes.parts.merged import Comparison
from recipes.parts.provenance import provenance, without_folder
from recipes.parts.task import Task
from smt_trainer import BlockSelection
from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE
from smt_trainer.files import write_text

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "safetensors", "smt_trainer")


@dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
        dtype: dtype of the weights; for a quantised base, of those that are not quantised.
        quantization: description of how the base is quantised; None if it is not.
        evaluated_on: the split of the questions.
        merged: comparison of the merged model with the trained one.
        beside: result of a PEFT method on the same records; None if none was asked for.
        seconds_per_step: median over the optimizer steps of training; None without steps.
        peak_memory_bytes: of this process up to the end of training (allocated on the GPU if there is one).
        total_seconds: from the start of the script, everything included.
    """

    task: Task
    model: str
    dtype: str
    quantization: str | None
    evaluated_on: str
    before: Evaluation
    after: Evaluation
    merged: Comparison
    beside: Beside | None
    selection: BlockSelection
    steps: int
    seconds_per_step: float | None
    peak_memory_bytes: int
    delta_folder: Path
    seed: int
    total_seconds: float

    def to_dict(self) -> dict:
        """Return the contents of `results.json`."""
        return {
            "task": self.task.name,
            "model": without_folder(self.model),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "evaluated_on": self.evaluated_on,
            "measures": {measure: summary(measure, self.before, self.after) for measure in self.after.values},
            "beside": self._beside(),
            "merged_onto": self.merged.onto,
            "merged_equal": self.merged.equal,
            "merged_moved": self.merged.moved._asdict(),
            "trainable_fraction": self.selection.fraction_of_model,
            "selection": self.selection.summary(),
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
            "total_seconds": self.total_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "delta_bytes": sum((self.delta_folder / name).stat().st_size for name in (DELTA_FILE, MANIFEST_FILE)),
            "seed": self.seed,
            **provenance("recipes.finetune", PACKAGES),
            "before": self.before.values,
            "after": self.after.values,
        }

    def _beside(self) -> dict | None:
        """Return the part of `results.json` about the PEFT method, with its gains over the untuned model."""
        if self.beside is None:
            return None
        measures = {measure: summary(measure, self.before, self.beside.result) for measure in self.beside.result.values}
        return {
            "method": self.beside.method,
            "learning_rate": self.beside.rate,
            "trained_parameters": self.beside.trained,
            "measures": measures,
            "values": self.beside.result.values,
        }


def summary(measure: str, before: Evaluation, after: Evaluation) -> dict:
    """Return the means of a measure in two evaluations, and the gain with the half width of its interval."""
    gain, half_width = paired_gain(before.values[measure], after.values[measure])
    return {
        "before": {"average": before.average(measure), "sets": before.means(measure)},
        "after": {"average": after.average(measure), "sets": after.means(measure)},
        "gain": gain,
        "half_width": half_width,
    }


def write_report(run: Run, output: Path) -> None:
    """Write both files into `output` and print the table."""
    text = markdown(run)
    write_json(output / "results.json", run.to_dict())
    write_text(output / "results.md", text)
    tqdm.write(text)


def markdown(run: Run) -> str:
    """Return the text of `results.md`: the measures of each question set before and after training, then the cost."""
    results = run.to_dict()
    evaluations = {"untuned": run.before, "tuned": run.after}
    if run.beside:
        evaluations[run.beside.method] = run.beside.result
    measures = list(run.after.values)
    questions = sum(map(len, run.after.values[measures[0]].values()))
    lines = [
        f"# {results['model']} on the {run.task.name} task\n",
        f"Measured on {questions:,} {run.evaluated_on} questions.\n",
        *(
            f"- {measure}: {run.task.measures[measure]}{'; less is better' if is_loss(measure) else ', in %'}"
            for measure in measures
        ),
        "",
        table(evaluations),
        *(f"Warning: {line}.\n" for line in constant_answers(evaluations)),
        f"Gain: {', '.join(gain_text(measure, run.before, run.after) for measure in measures)} "
        "(paired 95 % interval).\n",
        *_compared(run),
        markdown_table("|", [*_costs(results), *_merged(run), *provenance_rows(results)]),
    ]
    return "\n".join(lines)


def _compared(run: Run) -> list[str]:
    """Return a paragraph about the PEFT method, if there is one."""
    if run.beside is None:
        return []
    gains = ", ".join(gain_text(measure, run.beside.result, run.after) for measure in run.beside.result.values)
    setting = f"{run.beside.trained:,} parameters, rate {run.beside.rate:g}, the same records and steps"
    return [f"Against {run.beside.method} ({setting}): {gains}.\n"]


def _costs(results: dict) -> list[list[str]]:
    """Return rows of what was trained and what it took."""
    step = results["seconds_per_step"]
    return [
        ["weights", results["dtype"]],
        *([["quantised base", results["quantization"]]] if results["quantization"] else []),
        ["trained", results["selection"]],
        ["trainable", f"{100 * results['trainable_fraction']:.3f} % of all parameters"],
        ["steps", f"{results['steps']}, {'none timed' if step is None else f'{step:.2f} s each (median)'}"],
        ["whole run", f"{results['total_seconds'] / 60:.1f} min"],
        ["peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB"],
        ["delta", f"{results['delta_bytes'] / 2**20:.2f} MiB"],
    ]


def _merged(run: Run) -> list[list[str]]:
    """Return rows of what was merged, and how it differs from the trained model."""
    onto = [] if run.merged.onto is None else [["merged onto", f"{run.merged.onto} weights"]]
    equal = "yes" if run.merged.equal else f"NO: {run.merged.moved}"
    return [*onto, ["merged checkpoint equal to the trained model", equal]]
