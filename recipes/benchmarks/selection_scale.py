"""Measure how selection and warm-up scale with the number of blocks and targets, up to Llama-3.1-405B.

python -m recipes.benchmarks.selection_scale --output recipes/benchmarks/results
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recipes.benchmarks.parts.hooks import SCORES, measure_warmup
from recipes.benchmarks.parts.models import MODELS, Shape
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.selection import measure_selection
from recipes.parts.markdown import gib, provenance_rows, table
from recipes.parts.provenance import provenance

PACKAGES = ("torch", "transformers", "numpy", "smt_trainer")
LAYERS = (2, 8, 32, 128, 256)
SEED = 0


def measure(models: dict[str, Shape], layers: Sequence[int], rounds: int) -> dict:
    """Measure and return the contents of `selection_scale.json`."""
    selection = measure_selection(models, rounds, SEED)
    slope, _ = np.polyfit([row["blocks"] for row in selection], [row["peak_bytes"] for row in selection], 1)
    return {
        "selection": selection,
        "bytes_per_block": slope,
        # Smaller models run more rounds, so that all take about as long.
        "warmup": [measure_warmup(count, rounds * max(layers) // count, SEED) for count in tqdm(layers, "warm-up")],
        "rounds": rounds,
        **provenance("recipes.benchmarks.selection_scale", PACKAGES),
        "seed": SEED,
    }


def markdown(results: dict) -> str:
    """Return the text of `selection_scale.md`."""
    selection, warmup = results["selection"], results["warmup"]
    parts = [
        "# How selection and warm-up scale\n",
        "Budget 0.84 % of all parameters, random scores. Seconds of processor time on one thread, medians of "
        f"{results['rounds']} rounds. Plan: find targets, cut them, count parameters. Memory: peak of `select_blocks` "
        "above model and scores (resident, in its own process).\n",
        table(
            "model|cut|block of q|targets|blocks|chosen|plan|select|save|load|file, MiB|memory, MiB|bytes a block",
            [
                [row["model"], row["cut"], "x".join(map(str, row["block_shape"]))]
                + [f"{row[what]:,}" for what in ("targets", "blocks", "chosen")]
                + [f"{row[f'{action}_seconds']:.3f}" for action in ("plan", "select", "save", "load")]
                + [mib(row["json_bytes"]), mib(row["peak_bytes"]), f"{row['peak_bytes'] / row['blocks']:.1f}"]
                for row in selection
            ],
        ),
        f"A straight line fitted to all cases rises by {results['bytes_per_block']:.1f} bytes a block.\n",
        "## What a warm-up keeps\n",
        table(
            "model|cut|`grad_l1`, GiB|`grad_signed`, MiB",
            [[row["model"], row["cut"], gib(row["grad_l1_bytes"]), mib(row["grad_signed_bytes"])] for row in selection],
        ),
        "## What the scorers add to a step\n",
        "Llama of hidden size 64, 8 tokens: forward and backward through a frozen model, and the time that a score "
        "adds (lower quartiles).\n",
        table(
            "layers|targets|frozen, ms|`grad_l1`, µs a target|`grad_signed`, µs a target",
            [
                [str(row["layers"]), str(row["targets"]), f"{1e3 * row['plain_seconds']:.1f}"]
                + [f"{1e6 * row[f'{score}_added_seconds'] / row['targets']:.0f}" for score in SCORES]
                for row in warmup
            ],
        ),
        table(
            "|",
            provenance_rows(results),
        ),
    ]
    return "\n".join(parts)


def mib(count: int) -> str:
    """Format bytes in MiB."""
    return f"{count / 2**20:.3f}"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for selection_scale.json and .md")
    parser.add_argument("--rounds", type=int, default=7, help="how often each action is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(MODELS, LAYERS, arguments.rounds)
    write_results(arguments.output, "selection_scale", results, markdown(results))


if __name__ == "__main__":
    main()
