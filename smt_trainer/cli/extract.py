"""`smt extract BASE FINETUNED OUT`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import add_base, add_command, add_config_flags, add_json, add_out, given_fields
from smt_trainer.cli.output import BLOCKS, OUTPUT, blocks, write
from smt_trainer.config import SMTConfig

FIELDS = [*SMTConfig.deciding("targets", "choice"), "block_size", "granularity"]
KEYS = {
    "output": OUTPUT,
    "selection": BLOCKS,
    "whole": "tensors that the delta holds whole",
    "is_exact": "whether merging gives FINETUNED bit for bit",
    "left": "what is left of the change, from 0 to 1",
    "left_of": "tensor -> what is left of its change",
}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "extract",
        run,
        "make a delta from two checkpoints, exactly or within a budget",
        "Without --budget the delta takes all that differs: blocks of --target-modules ('all-linear' if not given), "
        "and other tensors whole; merging it gives FINETUNED bit for bit. With --budget it takes the blocks that "
        "change most. With base and fine-tuned swapped, it undoes a merge: smt extract MERGED BASE back.",
    )
    add_base(parser)
    parser.add_argument("finetuned", metavar="FINETUNED", help="fine-tuned checkpoint: a folder, or a name on the hub")
    add_out(parser)
    add_config_flags(parser, FIELDS)
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Write the delta, and print its blocks and what it leaves; see `extract_delta`."""
    given = given_fields(arguments, FIELDS)

    from smt_trainer.arithmetic.extract import extract_delta

    found = extract_delta(arguments.base, arguments.finetuned, arguments.out, base_revision=arguments.revision, **given)
    result = {
        "output": arguments.out,
        "selection": blocks(found.selection),
        "whole": found.whole,
        "is_exact": found.is_exact,
        "left": found.left,
        "left_of": found.left_of,
    }
    write(arguments, result, [*str(found).split("\n"), f"delta in {arguments.out}"])
