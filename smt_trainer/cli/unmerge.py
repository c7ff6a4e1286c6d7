"""`smt unmerge MERGED DELTA OUT --base BASE`."""

from __future__ import annotations

import argparse
import logging
import os


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser(
        "unmerge",
        help="take a delta out of a merged checkpoint, bit for bit",
        epilog="A delta holds trained values, not differences, so the values that it replaced come from the base. To "
        "do without it later, keep the way back, as small as the delta: smt extract MERGED BASE back; later, "
        "smt merge MERGED back OUT.",
    )
    parser.add_argument("merged", help="folder of the merged checkpoint")
    parser.add_argument("delta", help="delta folder")
    parser.add_argument("out", help="folder to write; must be new or empty")
    parser.add_argument("--base", required=True, help="base checkpoint: a folder, or a name on the hub")
    parser.add_argument("--revision", help="revision of a base on the hub")
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="for a delta of a quantised base, as in smt merge; dequantized cannot be undone",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the base shard by shard, with a line for each; see `unmerge`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("smt_trainer").setLevel(logging.INFO)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from smt_trainer.delta.unmerge import unmerge

    unmerge(
        arguments.merged,
        arguments.delta,
        arguments.out,
        base=arguments.base,
        revision=arguments.revision,
        onto=arguments.onto,
    )
    print(f"base in {arguments.out}")
