"""Measure how long `smt merge` takes, compared with copying the base.

python -m recipes.benchmarks.merge --output recipes/benchmarks/results

A checkpoint in three shards and a delta have random weights. Each round copies the base with `cp -r`, merges the delta
into it with `smt merge`, and imports torch, each in its own process and from a warm disk cache, in a new random order.
The time is that of the whole process.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from recipes.benchmarks.parts.models import Shape
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.timing import quartiles
from recipes.parts.markdown import mib, provenance_rows, spread, table
from recipes.parts.provenance import provenance
from smt_trainer import BlockScores, SMTConfig, convert_to_smt, save_delta
from smt_trainer.model.targets import count_parameters
from smt_trainer.sparse.block_module import block_modules

PACKAGES = ("numpy", "torch", "transformers", "safetensors", "smt_trainer")
SEED = 0
SHAPE, SHARD = Shape(12, 2048, 32, 8, 8192, 32000, tie_word_embeddings=True), 600_000_000
# Runs the console script, then prints the peak of its resident memory in KiB.
SMT = """import sys
from smt_trainer.cli import main
assert main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


class Folders(NamedTuple):
    """Where base, delta and output lie."""

    base: Path
    delta: Path
    output: Path


def measure(shape: Shape, shard: int, config: SMTConfig, rounds: int) -> dict:
    """Measure a model in shards of at most `shard` bytes, and return the contents of `merge.json`."""
    with tempfile.TemporaryDirectory() as root:
        folders = Folders(*(Path(root, name) for name in Folders._fields))
        parameters = write(folders, shape, shard, config)
        sizes = [path.stat().st_size for path in folders.base.glob("*.safetensors")]
        delta = sum(path.stat().st_size for path in folders.delta.iterdir())
        seconds, peaks = time_rounds(folders, rounds)
    return {
        "parameters": parameters,
        "base_bytes": sum(sizes),
        "shards": len(sizes),
        "largest_shard_bytes": max(sizes),
        "delta_bytes": delta,
        "seconds": {action: quartiles(found) for action, found in seconds.items()},
        "to_copy": {
            action: quartiles([one / copy for one, copy in zip(found, seconds["cp -r"], strict=True)])
            for action, found in seconds.items()
        },
        "merge_peak_bytes": statistics.median(peaks),
        "rounds": rounds,
        **provenance("recipes.benchmarks.merge", PACKAGES),
        "seed": SEED,
    }


def write(folders: Folders, shape: Shape, shard: int, config: SMTConfig) -> int:
    """Write a base in bfloat16, and a delta that changes each chosen weight; return the number of parameters."""
    torch.manual_seed(SEED)
    model = shape.build().bfloat16()
    model.save_pretrained(folders.base, max_shard_size=shard)
    parameters = count_parameters(model)
    convert_to_smt(model, BlockScores.of(model, config, [], SEED).select())
    with torch.no_grad():
        for _, linear in block_modules(model):
            linear.blocks += 1
    save_delta(model, folders.delta)
    return parameters


def time_rounds(folders: Folders, rounds: int) -> tuple[dict[str, list[float]], list[int]]:
    """Return action -> seconds of each round; and the peak memory of each merge in bytes."""
    base, delta, output = map(str, folders)
    actions = {
        "cp -r": ["cp", "-r", base, output],
        "smt merge": [sys.executable, "-c", SMT, "merge", base, delta, output],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    seconds: dict[str, list[float]] = {action: [] for action in actions}
    peaks, order, shuffle = [], list(actions), random.Random(SEED).shuffle
    # The first round fills the disk cache.
    for number in tqdm(range(rounds + 1), "merge"):
        shuffle(order)
        for action in order:
            os.sync()
            started = time.perf_counter()
            run = subprocess.run(actions[action], check=True, capture_output=True, text=True)
            if number:
                seconds[action].append(time.perf_counter() - started)
                peaks += [1024 * int(run.stdout.split()[-1])] if action == "smt merge" else []
            shutil.rmtree(output, ignore_errors=True)
    return seconds, peaks


def markdown(results: dict) -> str:
    """Return the text of `merge.md`."""
    return "\n".join(
        [
            "# What `smt merge` takes beside copying the base\n",
            f"{results['parameters']:,} random parameters in bfloat16: {mib(results['base_bytes'])} MiB in "
            f"{results['shards']} shards. The delta has {mib(results['delta_bytes'])} MiB. Seconds on the clock for "
            "whole processes, from a warm disk cache to a disk with nothing left to write, and ratios within a round: "
            f"medians (and quartiles) of {results['rounds']} rounds.\n",
            table(
                "|seconds|to `cp -r`",
                [
                    [f"`{action}`", spread(found), spread(results["to_copy"][action])]
                    for action, found in results["seconds"].items()
                ],
            ),
            f"Peak resident memory of the merge: {mib(results['merge_peak_bytes'])} MiB, where the largest shard has "
            f"{mib(results['largest_shard_bytes'])} MiB.\n",
            table("|", provenance_rows(results)),
        ]
    )


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for merge.json and .md")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is run")
    arguments = parser.parse_args()
    disable_progress_bar()
    results = measure(SHAPE, SHARD, SMTConfig(score="random"), arguments.rounds)
    write_results(arguments.output, "merge", results, markdown(results))


if __name__ == "__main__":
    main()
