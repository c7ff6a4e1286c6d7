"""Measure how long the fingerprint of a base takes, compared with loading the base.

python -m recipes.benchmarks.fingerprint --output recipes/benchmarks/results

A checkpoint with random weights is loaded from a warm disk cache, and each of its values is read once: loading maps the
file into memory and leaves the reading to the first use. Then its fingerprint is taken.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from recipes.benchmarks.parts.models import MODELS, Shape
from recipes.benchmarks.parts.results import write_results
from recipes.parts.markdown import provenance_rows, table
from recipes.parts.provenance import provenance
from smt_trainer.model.fingerprint import RUN, RUNS, Fingerprint

PACKAGES = ("torch", "transformers", "safetensors", "smt_trainer")
SEED = 0


class Case(NamedTuple):
    """A model in the dtype of its checkpoint, and the dtype that it is loaded in."""

    model: str
    shape: Shape
    stored: str
    loaded: str


SMALL, LARGE = MODELS["SmolLM2-135M"], Shape(16, 2048, 32, 8, 8192, 128256, tie_word_embeddings=True)
CASES = [
    Case("SmolLM2-135M", SMALL, "float32", "float32"),
    Case("SmolLM2-135M", SMALL, "bfloat16", "bfloat16"),
    Case("Llama-3.2-1B", LARGE, "bfloat16", "bfloat16"),
    Case("Llama-3.2-1B", LARGE, "bfloat16", "float32"),
]


def measure(cases: list[Case], rounds: int) -> dict:
    """Measure and return the contents of `fingerprint.json`."""
    return {
        "cases": [measure_case(case, rounds) for case in tqdm(cases, "fingerprint")],
        "rounds": rounds,
        **provenance("recipes.benchmarks.fingerprint", PACKAGES),
        "seed": SEED,
    }


def measure_case(case: Case, rounds: int) -> dict:
    """Save a model, and time loading, reading and fingerprint in turn; medians in seconds."""
    torch.manual_seed(SEED)
    seconds: dict[str, list[float]] = {"load": [], "read": [], "fingerprint": []}
    with tempfile.TemporaryDirectory() as folder:
        case.shape.build().to(getattr(torch, case.stored)).save_pretrained(folder)
        for _ in range(rounds + 1):
            model = timed(seconds["load"], lambda: load(folder, case.loaded))
            timed(seconds["read"], lambda model=model: [parameter.sum() for parameter in model.parameters()])
            timed(seconds["fingerprint"], lambda model=model: Fingerprint.of(model, getattr(torch, case.stored)))
    # The first round fills the disk cache.
    medians = {action: statistics.median(found[1:]) for action, found in seconds.items()}
    shares = [c / (a + b) for a, b, c in list(zip(*seconds.values(), strict=True))[1:]]
    return {
        **{name: getattr(case, name) for name in ("model", "stored", "loaded")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **medians,
        "share": statistics.median(shares),
    }


def load(folder: str, dtype: str) -> torch.nn.Module:
    """Load the model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def timed(seconds: list[float], action: Callable):
    """Run an action, append the seconds that it takes, and return what it returns."""
    started = time.perf_counter()
    result = action()
    seconds.append(time.perf_counter() - started)
    return result


def markdown(results: dict) -> str:
    """Return the text of `fingerprint.md`."""
    return "\n".join(
        [
            "# What the fingerprint of a base takes\n",
            f"About {RUNS:,} runs of {RUN} neighbouring values are summed, and small tensors whole. Loading is "
            "`from_pretrained` from a warm disk cache, and one reading of each value, which it leaves to the first "
            f"use. Seconds on the clock, medians of {results['rounds']} rounds; the share is the median of the rounds' "
            "shares.\n",
            table(
                "model|parameters|stored in|loaded in|load|read|fingerprint|share of loading",
                [
                    [row["model"], f"{row['parameters']:,}", row["stored"], row["loaded"]]
                    + [f"{row[action]:.4f}" for action in ("load", "read", "fingerprint")]
                    + [f"{row['share']:.1%}"]
                    for row in results["cases"]
                ],
            ),
            table("|", provenance_rows(results)),
        ]
    )


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for fingerprint.json and .md")
    parser.add_argument("--rounds", type=int, default=7, help="how often each model is loaded")
    arguments = parser.parse_args()
    disable_progress_bar()
    results = measure(CASES, arguments.rounds)
    write_results(arguments.output, "fingerprint", results, markdown(results))


if __name__ == "__main__":
    main()
