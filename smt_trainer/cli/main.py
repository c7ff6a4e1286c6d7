"""`smt`: parse the command line and run a command."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys

from smt_trainer import __version__
from smt_trainer.cli import (
    completion,
    compose,
    diff,
    estimate,
    export,
    extract,
    inspect,
    merge,
    select,
    unmerge,
    verify,
)
from smt_trainer.errors import SMTError, one_line

# The exit status of argparse for a command line that it cannot parse.
FAILED = 2
# The exit status that a shell reports for a process ended by SIGINT or SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141
COMMANDS = (
    select,
    inspect,
    merge,
    verify,
    unmerge,
    extract,
    diff,
    compose,
    export,
    estimate,
    completion,
)


def main(argv: list[str] | None = None) -> int:
    """Run `smt` with the given arguments (by default, those of the process); return the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("smt_trainer").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal's encoding lacks are escaped, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = arguments.run(arguments)
        # Without standard output (`smt inspect delta >&-`) there is nothing to flush.
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`smt inspect delta | head`).
        _write_no_more()
        return PIPE_CLOSED
    except (SMTError, OSError, MemoryError) as error:
        _complain(_said(error))
        return FAILED
    return status or 0


def _complain(text: str) -> None:
    # The disk under standard error may be full as well.
    with contextlib.suppress(OSError):
        print(f"smt: {one_line(text)}", file=sys.stderr)


def _said(error: SMTError | OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory. {error}"
    if isinstance(error, SMTError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smt",
        description="Sparse Matrix Tuning: estimate, choose blocks; inspect, merge, verify, export, add up deltas.",
        epilog="Exit status: 0 for success; 1 if the answer is no (smt verify); 2 for an error, in one line on "
        "standard error; 130 if interrupted; 141 if the reader of its output has gone.",
    )
    parser.add_argument("--version", action="version", version=f"smt_trainer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _write_no_more() -> None:
    """Redirect standard output to nowhere, since Python flushes it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
