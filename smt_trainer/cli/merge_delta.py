"""`smt merge BASE DELTA OUT`."""

from __future__ import annotations

import argparse
import logging
import os

from smt_trainer.cli.options import add_base_and_delta, add_onto


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser("merge", help="merge a delta into its base checkpoint")
    add_base_and_delta(parser, "out", "folder to write; must be new or empty")
    add_onto(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Merge the delta shard by shard, with a line for each; see `merge_checkpoint`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("smt_trainer").setLevel(logging.INFO)
    # The threads of numpy's BLAS, which nothing here uses, take as long to start as numpy itself.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from smt_trainer.delta.merge import merge_checkpoint

    merge_checkpoint(arguments.base, arguments.delta, arguments.out, revision=arguments.revision, onto=arguments.onto)
    print(f"merged checkpoint in {arguments.out}")
