"""`smt verify BASE DELTA MERGED`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from smt_trainer.cli.options import add_base_and_delta

if TYPE_CHECKING:
    from smt_trainer.delta.moved import Moved
    from smt_trainer.delta.verify import Counts

# Problems that are printed; --json has all.
MOST_LINES = 20


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser(
        "verify",
        help="prove that a checkpoint is a base with a delta merged into it",
        epilog="Exit status: 0 if the merge is proven; 1 if something differs, or if base or delta cannot be read; "
        "2 if the command line cannot.",
    )
    add_base_and_delta(parser, "merged", "folder of the merged checkpoint")
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="for a delta of a quantised base, as in smt merge; dequantized cannot be verified",
    )
    parser.add_argument("--logits", action="store_true", help="also load both models, and compare their logits")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what a merge has changed and what is wrong with it; return 0 if nothing is.

    The bytes are the proof: they need no torch, little memory and about the time that reading takes, so they suit any
    CI machine. `--logits` adds that transformers loads the folder and computes with it exactly what it does with base
    and delta; it takes the memory of both models, and is left out if bytes differ, since it could only repeat that.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from smt_trainer.delta.verify import verify_merge
    from smt_trainer.errors import printable

    found = verify_merge(
        arguments.base,
        arguments.delta,
        arguments.merged,
        revision=arguments.revision,
        delta_revision=arguments.delta_revision,
        onto=arguments.onto,
    )
    problems, logits = found.problems, None
    if arguments.logits and not problems:
        logits = _compare_logits(arguments)
        # Not for NaN either.
        if not logits.divergence == logits.largest == 0:
            problems = [("logits", f"are not those of base and delta {logits}")]
    if arguments.json:
        result = {
            "verified": not problems,
            "compared": found.compared,
            "tensors": {name: counts._asdict() for name, counts in found.tensors.items()},
            "problems": [{"where": where, "problem": problem} for where, problem in problems],
            "logits": None if logits is None else logits._asdict(),
        }
        print(json.dumps(result, indent=2))
        return int(bool(problems))
    if found.tensors:
        _print_table(found.tensors)
        print(f"{found.compared - len(found.tensors)} other tensors are not trained\n")
    if logits is not None:
        print(f"{logits}\n")
    for where, problem in problems[:MOST_LINES]:
        print(f"{printable(where)} {printable(problem)}")
    if len(problems) > MOST_LINES:
        print(f"and {len(problems) - MOST_LINES} more; --json lists all")
    said = "is not" if problems else "is"
    print(f"{'NOT ' * bool(problems)}verified: {arguments.merged} {said} the base with the delta merged into it")
    return int(bool(problems))


def _print_table(tensors: dict[str, Counts]) -> None:
    from smt_trainer.errors import printable

    width = max(map(len, tensors))
    print(f"{'tensor':<{width}}{'values':>15}{'trained':>15}{'changed':>15}")
    for name, counts in [*tensors.items(), ("all", map(sum, zip(*tensors.values(), strict=True)))]:
        print(f"{printable(name):<{width}}" + "".join(f"{count:>15,}" for count in counts))


def _compare_logits(arguments: argparse.Namespace) -> Moved:
    """Compare base and delta with the merged checkpoint. Raise `SMTError` if one of them cannot be loaded."""
    from smt_trainer.delta.load import from_delta
    from smt_trainer.delta.moved import moved_by_merging
    from smt_trainer.errors import SMTError

    try:
        trained = from_delta(
            arguments.delta,
            revision=arguments.delta_revision,
            base=arguments.base,
            base_revision=arguments.revision,
            onto=arguments.onto,
            dtype="auto",
        ).eval()
        found = moved_by_merging(trained, Path(arguments.merged))
    except SMTError:
        raise
    except Exception as error:  # an odd file makes transformers raise anything
        raise SMTError(f"the models cannot be loaded to compare logits: {str(error).partition(chr(10))[0]}") from error
    if found is None:
        raise SMTError("this model has no logits over a vocabulary; leave out --logits.")
    return found
