"""`smt`: parse the command line and run a command."""

from __future__ import annotations

import argparse
import os
import sys

from smt_trainer import __version__
from smt_trainer.cli import (
    compose,
    diff,
    estimate,
    export,
    extract,
    inspect_artefact,
    merge_delta,
    select,
    unmerge,
    verify_merge,
)
from smt_trainer.errors import SMTError, one_line

# As a shell reports a process that SIGINT or SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141
COMMANDS = (
    select,
    inspect_artefact,
    merge_delta,
    verify_merge,
    unmerge,
    extract,
    diff,
    compose,
    export,
    estimate,
)


def main(argv: list[str] | None = None) -> int:
    """Run `smt` with the given arguments (by default, those of the process); return the exit status."""
    parser = argparse.ArgumentParser(
        prog="smt",
        description="Sparse Matrix Tuning: estimate, choose blocks; inspect, merge, verify, export, add up deltas.",
    )
    parser.add_argument("--version", action="version", version=f"smt_trainer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("smt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`smt inspect delta | head`). Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (SMTError, OSError) as error:
        print(f"smt: {one_line(str(error))}", file=sys.stderr)
        return 1
    return status or 0
