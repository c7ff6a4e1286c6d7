"""`smt`: parse the command line and run a command."""

from __future__ import annotations

import argparse
import sys

from smt_trainer import __version__
from smt_trainer.cli import estimate, inspect_artefact, merge_delta, select
from smt_trainer.errors import SMTError

COMMANDS = (select, inspect_artefact, merge_delta, estimate)


def main(argv: list[str] | None = None) -> int:
    """Run `smt` with the given arguments (by default, those of the process); return the exit status."""
    parser = argparse.ArgumentParser(
        prog="smt", description="Sparse Matrix Tuning: estimate a run, choose its blocks, inspect and merge its deltas."
    )
    parser.add_argument("--version", action="version", version=f"smt_trainer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (SMTError, OSError) as error:
        print(f"smt: {error}", file=sys.stderr)
        return 1
    return 0
