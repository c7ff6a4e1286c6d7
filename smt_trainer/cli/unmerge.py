"""`smt unmerge BASE DELTA MERGED OUT`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import (
    add_base_and_delta,
    add_command,
    add_json,
    add_merged,
    add_onto,
    add_out,
    leave_out_threads,
)
from smt_trainer.cli.output import OUTPUT, write

KEYS = {"output": OUTPUT}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "unmerge",
        run,
        "take a delta out of a merged checkpoint, bit for bit",
        "A delta holds trained values, not differences, so the values that it replaced come from the base. To do "
        "without the base later, keep the reverse delta, which is as small: smt extract MERGED BASE back; later, smt "
        "merge MERGED back OUT.",
    )
    add_base_and_delta(parser)
    add_merged(parser)
    add_out(parser)
    add_onto(parser, "as in smt merge; dequantized cannot be undone")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Write the base shard by shard, and log each; see `unmerge`."""
    leave_out_threads()

    from smt_trainer.merging.unmerge import unmerge

    unmerge(
        arguments.base,
        arguments.delta,
        arguments.merged,
        arguments.out,
        base_revision=arguments.revision,
        delta_revision=arguments.delta_revision,
        onto=arguments.onto,
    )
    write(arguments, {"output": arguments.out}, [f"base in {arguments.out}"])
