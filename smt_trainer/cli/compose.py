"""`smt compose BASE DELTA [DELTA ...] OUT`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import add_base, add_command, add_json, add_out, leave_out_threads
from smt_trainer.cli.output import BLOCKS, OUTPUT, blocks, write

KEYS = {
    "output": OUTPUT,
    "selection": BLOCKS,
    "shared": "module -> number of its blocks that more than one delta trains",
    "shared_whole": "tensors that more than one delta holds whole",
}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "compose",
        run,
        "add up what several deltas change in one base, as one delta",
        "Tokenizer, chat template and settings are copied from the first delta's folder.",
    )
    add_base(parser)
    parser.add_argument("deltas", nargs="+", metavar="DELTA", help="deltas: folders, or names on the hub")
    add_out(parser)
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="FACTOR", help="one for the changes of each delta (default: 1)"
    )
    parser.add_argument("--mean", action="store_true", help="divide the sum of changes by the number of deltas")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Write the composed delta, and print its blocks and where the deltas overlap; see `compose_deltas`."""
    leave_out_threads()

    from smt_trainer.arithmetic.compose import compose_deltas

    found = compose_deltas(
        arguments.base,
        arguments.deltas,
        arguments.out,
        weights=arguments.weights,
        mean=arguments.mean,
        base_revision=arguments.revision,
    )
    result = {
        "output": arguments.out,
        "selection": blocks(found.selection),
        "shared": found.shared,
        "shared_whole": found.shared_whole,
    }
    write(arguments, result, [*str(found).split("\n"), f"delta in {arguments.out}"])
