"""`smt verify BASE DELTA MERGED`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from smt_trainer.cli.options import add_base_and_delta, add_command, add_json, add_merged, add_onto, leave_out_threads
from smt_trainer.cli.output import table, write
from smt_trainer.errors import SMTError, first_line

if TYPE_CHECKING:
    from smt_trainer.merging.logit_difference import LogitDifference
    from smt_trainer.merging.verify import Verification

# Problems that are printed; --json has all.
MOST_LINES = 20
KEYS = {
    "verified": "whether MERGED is BASE with DELTA",
    "compared": "tensors of the base",
    "tensors": "trained tensor -> numbers of values, of trained and of changed ones",
    "problems": "where, and what the problem is",
    "logits": "with --logits, how far they differ, or null",
}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "verify",
        run,
        "prove that a checkpoint is a base with a delta merged into it",
        "Exit status: 0 if the merge is proven; 1 if something differs; 2 if base or delta cannot be read.",
    )
    add_base_and_delta(parser)
    add_merged(parser)
    add_onto(parser, "as in smt merge; dequantized cannot be verified")
    parser.add_argument("--logits", action="store_true", help="also load both models, and compare their logits")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> int:
    """Print what a merge has changed and what is wrong with it; return 0 if nothing is wrong.

    Comparing bytes is the proof: it needs no torch, little memory and about as long as reading the files, so it suits
    any CI machine. `--logits` also checks that transformers loads the folder and computes exactly the same as with base
    and delta; it takes the memory of both models, and is skipped if bytes differ, since it could only repeat that.
    """
    leave_out_threads()

    from smt_trainer.merging.verify import verify_merge

    found = verify_merge(
        arguments.base,
        arguments.delta,
        arguments.merged,
        base_revision=arguments.revision,
        delta_revision=arguments.delta_revision,
        onto=arguments.onto,
    )
    problems, logits = found.problems, None
    if arguments.logits and not problems:
        logits = _compare_logits(arguments)
        # NaN fails as well.
        if not logits.divergence == logits.largest == 0:
            problems = [("logits", f"are not those of base and delta {logits}")]
    result = {
        "verified": not problems,
        "compared": found.compared,
        "tensors": {name: counts._asdict() for name, counts in found.tensors.items()},
        "problems": [{"where": where, "problem": problem} for where, problem in problems],
        "logits": None if logits is None else logits._asdict(),
    }
    write(arguments, result, _lines(found, problems, logits, arguments.merged))
    return int(bool(problems))


def _lines(
    found: Verification, problems: list[tuple[str, str]], logits: LogitDifference | None, merged: str
) -> Iterator[str]:
    if found.tensors:
        counts: dict[str, Iterable[int]] = {**found.tensors}
        counts["all"] = map(sum, zip(*found.tensors.values(), strict=True))
        rows = {name: [f"{count:,}" for count in row] for name, row in counts.items()}
        yield from table(["tensor", "values", "trained", "changed"], rows)
        yield f"{found.compared - len(found.tensors)} other tensors are not trained"
        yield ""
    if logits is not None:
        yield str(logits)
        yield ""
    for where, problem in problems[:MOST_LINES]:
        yield f"{where} {problem}"
    if len(problems) > MOST_LINES:
        yield f"and {len(problems) - MOST_LINES} more; --json lists all"
    said = "is not" if problems else "is"
    yield f"{'NOT ' * bool(problems)}verified: {merged} {said} the base with the delta merged into it"


def _compare_logits(arguments: argparse.Namespace) -> LogitDifference:
    """Compare base and delta with the merged checkpoint. Raise `SMTError` if one of them cannot be loaded."""
    from smt_trainer.delta.load import from_delta
    from smt_trainer.merging.logit_difference import compare_with_merged

    try:
        trained = from_delta(
            arguments.delta,
            revision=arguments.delta_revision,
            base=arguments.base,
            base_revision=arguments.revision,
            onto=arguments.onto,
            dtype="auto",
        ).eval()
        found = compare_with_merged(trained, Path(arguments.merged))
    except SMTError:
        raise
    except Exception as error:  # an odd file makes transformers raise anything
        raise SMTError(f"the models cannot be loaded to compare logits: {first_line(error)}") from error
    if found is None:
        raise SMTError("this model has no logits over a vocabulary; leave out --logits.")
    return found
