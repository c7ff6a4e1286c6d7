"""`smt merge BASE DELTA OUT`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import add_base_and_delta, add_command, add_json, add_onto, add_out, leave_out_threads
from smt_trainer.cli.output import OUTPUT, write

KEYS = {"output": OUTPUT}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(commands, "merge", run, "merge a delta into its base checkpoint")
    add_base_and_delta(parser)
    add_out(parser)
    add_onto(parser, "merge into its dequantised weights, or into those that were quantised")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Merge the delta shard by shard, and log each; see `merge_checkpoint`."""
    leave_out_threads()

    from smt_trainer.merging.merge import merge_checkpoint

    merge_checkpoint(
        arguments.base,
        arguments.delta,
        arguments.out,
        base_revision=arguments.revision,
        delta_revision=arguments.delta_revision,
        onto=arguments.onto,
    )
    write(arguments, {"output": arguments.out}, [f"merged checkpoint in {arguments.out}"])
