"""`smt extract BASE FINETUNED OUT`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import add_config_flags, given_fields
from smt_trainer.config import SMTConfig

FIELDS = [*SMTConfig.deciding("targets", "choice"), "block_size", "granularity"]


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser(
        "extract",
        help="make a delta of two checkpoints, exactly or within a budget",
        epilog="Without --budget the delta takes all that differs: blocks of --target-modules ('all-linear' if not "
        "given), and other tensors whole; merging it gives FINETUNED bit for bit. With --budget it takes the blocks "
        "that change most. With base and fine-tuned swapped, it is the way back: smt extract MERGED BASE back.",
    )
    parser.add_argument("base", help="base checkpoint: a folder, or a name on the hub")
    parser.add_argument("finetuned", help="the same with other values: a folder, or a name on the hub")
    parser.add_argument("out", help="folder for the delta; must be new or empty")
    parser.add_argument("--revision", help="revision of a base on the hub")
    add_config_flags(parser, FIELDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the delta, and print its blocks and what it leaves; see `extract_delta`."""
    given = given_fields(arguments, FIELDS)

    from smt_trainer.delta.extract import extract_delta

    print(extract_delta(arguments.base, arguments.finetuned, arguments.out, revision=arguments.revision, **given))
    print(f"delta in {arguments.out}")
