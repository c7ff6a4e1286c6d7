"""Measure a warm-up step for each score, and compare it with training steps.

python -m recipes.benchmarks.warmup --output recipes/benchmarks/results
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from recipes.benchmarks.parts import scoring, training
from recipes.benchmarks.parts.memory import peaks
from recipes.benchmarks.parts.methods import FLOOR, SMT, Variant
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.scoring import Scoring
from recipes.benchmarks.parts.setting import SHAPES, Setting
from recipes.benchmarks.parts.tables import TRAINED
from recipes.benchmarks.parts.timing import ratios, seconds, time_rounds
from recipes.benchmarks.parts.training import Training, copy_for
from recipes.parts.markdown import circumstances, mib, spread, table
from smt_trainer import SMTConfig
from smt_trainer.model.targets import count_parameters, find_targets
from smt_trainer.scores import SCORERS

BUDGET = 0.0084
LORA = "LoRA r=8"


def compare(setting: Setting, rounds: int) -> dict:
    """Time steps of the warm-up for each score, of training and of a floor in turn, with ratios within each round."""
    scores = [score for score, scorer in SCORERS.items() if scorer.needs_warmup]
    if setting.targets == "experts":
        # It tells examples apart, but a router sends single tokens to the experts.
        scores.remove("qm_taylor")
    variants = {FLOOR: Variant(FLOOR), SMT: Variant(SMT, BUDGET), LORA: Variant("LoRA", _budget_of_rank(setting, 8))}
    # Peaks are measured first, while nothing else is in memory.
    starts = {name: partial(training.start, variant) for name, variant in variants.items()}
    peak_bytes = peaks(starts | {score: partial(scoring.start, score) for score in scores}, setting)
    model, tokens = setting.build(), setting.tokens()
    steps = {name: Training(copy_for(variant, model), variant, setting) for name, variant in variants.items()}
    steps |= {score: Scoring(copy_for(variants[FLOOR], model), score, setting.targets) for score in scores}
    for step in steps.values():
        # The first step is slow.
        step.step(tokens)
    samples = time_rounds(steps, tokens, rounds)
    return {
        "steps": [
            {"step": name, "peak_bytes": peak_bytes[name]}
            | {"accumulator_bytes": step.accumulator_bytes if name in scores else None}
            | {"to": {other: ratios(samples, name, [other]) for other in variants}}
            | {"seconds": seconds(samples, name), "rounds": [sample[name]._asdict() for sample in samples]}
            for name, step in steps.items()
        ]
    }


def _budget_of_rank(setting: Setting, rank: int) -> float:
    """Return the fraction of all parameters in adapters of this rank on the query, key and value projections."""
    with torch.device("meta"):
        model = setting.shape.build()
    targets = find_targets(model, SMTConfig(target_modules=setting.targets)).values()
    return rank * sum(sum(target.weight.shape) for target in targets) / count_parameters(model)


def markdown(results: dict) -> str:
    """Return the text of `warmup.md`."""
    setting, timer, steps = results["setting"], results["timer"], results["steps"]
    others = list(steps[0]["to"])
    return "\n".join(
        [
            f"# A warm-up step of {results['shape']}\n",
            f"Random weights in {setting['dtype']}, {setting['batch']} x {setting['length']} random tokens. Each score "
            f"ranks the blocks of {TRAINED[setting.get('targets', 'qkv')]}; the class of a sequence for `qm_taylor` is "
            "its first token. The floor is the same model with all weights frozen and backward through all layers. "
            f"`{SMT}` and `{LORA}` are training steps on the same weights with `torch.optim.AdamW(fused=True)`: "
            f"`{SMT}` trains {100 * BUDGET:g} % of all parameters, `{LORA}` PEFT's adapters.\n",
            f"Each of {len(steps[0]['rounds'])} rounds takes one step of each in turn; a ratio compares two steps of "
            f"one round. Medians (and quartiles), by time of the {timer}. MiB. Peak: peak memory of a step above the "
            "plain model, in its own process.\n",
            table(
                "|".join(["step", *(f"to {other}" for other in others), "seconds", "peak", "accumulators"]),
                [
                    [row["step"], *(spread(row["to"][other][timer]) for other in others)]
                    + [f"{row['seconds'][timer]['median']:.3f}"]
                    + [mib(row[f"{what}_bytes"]) for what in ("peak", "accumulator")]
                    for row in steps
                ],
            ),
            circumstances(results),
        ]
    )


def report(shape: str, setting: Setting, rounds: int) -> dict:
    """Measure and return the contents of `warmup.json`."""
    load = os.getloadavg()[0]
    return compare(setting, rounds) | {
        "shape": shape,
        **setting.circumstances("recipes.benchmarks.warmup", load),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for warmup.json and warmup.md")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="model to measure")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each kind")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    arguments = parser.parse_args(words)
    shape = SHAPES[arguments.shape]
    setting = Setting(shape, batch=arguments.batch, length=arguments.length, threads=arguments.threads)
    results = report(arguments.shape, setting, arguments.rounds)
    stem = "warmup" if setting.targets == "qkv" else "warmup-experts"
    write_results(arguments.output, stem, results, markdown(results))


if __name__ == "__main__":
    main()
