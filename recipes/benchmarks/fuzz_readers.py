"""Damage deltas, selections and scores at random, and count what the readers do with them.

python -m recipes.benchmarks.fuzz_readers --cases 50000 --output recipes/benchmarks/results

A case is one mutation of one file: of its bytes, its header or a field of its JSON. In three of ten cases the checksum
is forged to fit the damage. A reader must refuse with SMTError or return the content that was saved. What it accepts
with a forged checksum is inspected, compared, put into a model and merged; only SMTError may be raised by that.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recipes.benchmarks.parts.readers import FORGED, REFUSED, SAME, attack, make_readers
from recipes.benchmarks.parts.results import write_results
from recipes.parts.markdown import provenance_rows, table
from recipes.parts.provenance import provenance

PACKAGES = ("torch", "safetensors", "numpy", "smt_trainer")
FAILED = "failed"
OUTCOMES = (REFUSED, SAME, FORGED, FAILED)
SLOW = 5.0  # seconds that no case may take


def run(cases: int, seed: int) -> dict[str, Any]:
    """Run the cases and return the contents of `fuzz_readers.json`."""
    started, counts, failures, longest = time.monotonic(), {}, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder))
        originals = {name: reader.path.read_bytes() for name, reader in readers.items()}
        expected = {name: reader.content(reader.read()) for name, reader in readers.items()}
        for case in tqdm(range(cases), "cases", mininterval=5):
            name = list(readers)[case % len(readers)]
            begun, rng = time.monotonic(), random.Random(f"{seed} {case}")
            try:
                _, outcome = attack(readers[name], originals[name], expected[name], rng)
            except Exception:  # any error but the reader's own is a failure to report
                outcome = FAILED
                failures.append({"case": case, "reader": name, "traceback": traceback.format_exc()})
            longest = max(longest, time.monotonic() - begun)
            counts.setdefault(name, Counter())[outcome] += 1
    return {
        "cases": cases,
        "outcomes": {name: {outcome: count[outcome] for outcome in OUTCOMES} for name, count in counts.items()},
        "failures": failures,
        "seconds": round(time.monotonic() - started, 1),
        "longest_case_seconds": round(longest, 3),
        **provenance("recipes.benchmarks.fuzz_readers", PACKAGES),
        "seed": seed,
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the text of `fuzz_readers.md`."""
    rows = [[name, *(f"{count[outcome]:,}" for outcome in OUTCOMES)] for name, count in results["outcomes"].items()]
    return "\n".join(
        [
            "# Damaged files\n",
            "A case is one random mutation of one file. A reader must refuse it with SMTError or return the content "
            "that was saved. In three of ten cases the checksum was made to fit; what is accepted then is inspected, "
            "compared, put into a model and merged, where only SMTError may come of it. Failed: anything else.\n",
            table("|".join(["reader", *OUTCOMES]), rows),
            table(
                "|",
                [
                    ["cases", f"{results['cases']:,}"],
                    ["seconds", f"{results['seconds']:,} in all, {results['longest_case_seconds']} the longest case"],
                    *provenance_rows(results),
                ],
            ),
        ]
    )


def main() -> None:
    """Run the cases and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder for fuzz_readers.json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    results = run(arguments.cases, arguments.seed)
    write_results(arguments.output, "fuzz_readers", results, markdown(results))


if __name__ == "__main__":
    main()
