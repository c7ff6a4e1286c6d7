"""The results of a run: `results.json` for machines, `results.md` for people."""

import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from recipes.commonsense.parts.evaluation import Evaluation, paired_gain
from recipes.parts.reporting import command, hardware, versions, without_folder
from smt_trainer import BlockSelection

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "safetensors", "smt_trainer")
DELTA_FILES = ("smt_delta.safetensors", "smt_config.json")


@dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
        evaluated_on: the split of the questions.
        seconds_per_step: median over the optimizer steps of training; None without steps.
        peak_memory_bytes: of this process up to the end of training (allocated on the GPU if there is one).
        total_seconds: from the start of the script, everything included.
    """

    model: str
    evaluated_on: str
    before: Evaluation
    after: Evaluation
    merged_equal: bool
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
            "model": without_folder(self.model),
            "evaluated_on": self.evaluated_on,
            "before": _scores(self.before),
            "after": _scores(self.after),
            "gain": _gain(self.before.correct, self.after.correct),
            "gain_likelihood": _gain(self.before.correct_by_likelihood, self.after.correct_by_likelihood),
            "merged_equal": self.merged_equal,
            "trainable_fraction": self.selection.fraction_of_model,
            "selection": self.selection.summary(),
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
            "total_seconds": self.total_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "delta_bytes": sum((self.delta_folder / name).stat().st_size for name in DELTA_FILES),
            "seed": self.seed,
            "command": command("recipes.commonsense.finetune"),
            "hardware": hardware(),
            "versions": versions(PACKAGES),
        }


def write_report(run: Run, output: Path) -> None:
    """Write both files into `output` and print the table."""
    results = run.to_dict()
    table = markdown(results)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(table, encoding="utf-8")
    tqdm.write(table)


def markdown(results: dict) -> str:
    """Return the text of `results.md`: accuracy per task before and after training, then the cost of the run."""
    before, after = results["before"], results["after"]
    questions = sum(task["questions"] for task in after["tasks"].values())
    lines = [
        f"# {results['model']} on the commonsense tasks\n",
        f"Accuracy in % on {questions:,} {results['evaluated_on']} questions, by generated answer and by likelihood.\n",
        "| task | questions | untuned | tuned | untuned, likelihood | tuned, likelihood |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, tuned in after["tasks"].items():
        untuned = before["tasks"][name]
        values = (untuned["generation"], tuned["generation"], untuned["likelihood"], tuned["likelihood"])
        lines.append(
            f"| {name} | {tuned['questions']:,} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"
        )
    values = (before["average"], after["average"], before["average_likelihood"], after["average_likelihood"])
    lines.append("| **average** | | " + " | ".join(f"**{100 * value:.1f}**" for value in values) + " |")
    gain, by_likelihood = results["gain"], results["gain_likelihood"]
    step = results["seconds_per_step"]
    lines += [
        "",
        f"Gain: {_points(gain)} by generation, {_points(by_likelihood)} by likelihood (paired 95 % interval).\n",
        "| | |",
        "|---|---|",
        f"| trained | {results['selection']} |",
        f"| trainable | {100 * results['trainable_fraction']:.3f} % of all parameters |",
        f"| steps | {results['steps']}, {'none timed' if step is None else f'{step:.2f} s each (median)'} |",
        f"| whole run | {results['total_seconds'] / 60:.1f} min |",
        f"| peak memory | {results['peak_memory_bytes'] / 2**30:.2f} GiB |",
        f"| delta | {results['delta_bytes'] / 2**20:.2f} MiB |",
        f"| merged checkpoint equal to the trained model | {'yes' if results['merged_equal'] else 'NO'} |",
        f"| hardware | {results['hardware']} |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in results['versions'].items())} |",
        f"| seed | {results['seed']} |",
        f"| command | `{results['command']}` |",
        "",
    ]
    return "\n".join(lines)


def _scores(evaluation: Evaluation) -> dict:
    by_likelihood = evaluation.accuracy_by_likelihood
    return {
        "average": evaluation.average,
        "average_likelihood": evaluation.average_likelihood,
        "tasks": {
            task: {
                "generation": accuracy,
                "likelihood": by_likelihood[task],
                "questions": len(evaluation.correct[task]),
            }
            for task, accuracy in evaluation.accuracy.items()
        },
    }


def _gain(before: dict[str, list[bool]], after: dict[str, list[bool]]) -> dict[str, float]:
    gain, half_width = paired_gain(before, after)
    return {"average": gain, "half_width": half_width}


def _points(gain: dict[str, float]) -> str:
    return f"{100 * gain['average']:+.1f} ± {100 * gain['half_width']:.1f} points"
