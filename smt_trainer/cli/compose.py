"""`smt compose BASE DELTA [DELTA ...] OUT`."""

from __future__ import annotations

import argparse
import os


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser(
        "compose",
        help="add up what several deltas change in one base, as one delta",
        epilog="Tokenizer, chat template and settings are those beside the first delta.",
    )
    parser.add_argument("base", help="base checkpoint of all deltas: a folder, or a name on the hub")
    parser.add_argument("deltas", nargs="+", metavar="delta", help="delta folders")
    parser.add_argument("out", help="folder for the composed delta; must be new or empty")
    parser.add_argument("--weights", type=float, nargs="+", help="a factor for the changes of each delta (default: 1)")
    parser.add_argument("--mean", action="store_true", help="divide the sum of changes by the number of deltas")
    parser.add_argument("--revision", help="revision of a base on the hub")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the composed delta, and print its blocks and where the deltas touch; see `compose_deltas`."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from smt_trainer.delta.compose import compose_deltas

    found = compose_deltas(
        arguments.base,
        arguments.deltas,
        arguments.out,
        weights=arguments.weights,
        mean=arguments.mean,
        revision=arguments.revision,
    )
    print(f"{found}\ndelta in {arguments.out}")
