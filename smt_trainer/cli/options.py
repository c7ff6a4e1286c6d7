"""What the commands share on their command line: arguments, flags, and fields of `SMTConfig` as flags.

Positional arguments come in the order BASE, DELTA, others, OUT. The metavar of an argument also tells a shell how to
complete it: see `completion.py`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from smt_trainer.config import SMTConfig
from smt_trainer.settings import settings

LARGEST = 2**31
NEGATIVE_NUMBER = re.compile(r"-\.?\d")
DTYPES = ("float32", "bfloat16", "float16")


def add_command(commands, name: str, run: Callable, does: str, more: str | None = None) -> argparse.ArgumentParser:
    """Add a command to the parser of `smt`, and return the command's parser.

    Args:
        commands: the commands of `smt`.
        name: name of the command.
        run: takes the parsed arguments; returns the exit status, or None for 0.
        does: what the command does, in a few words.
        more: text below the options in its help.
    """
    said = f"{does[0].upper()}{does[1:]}."
    parser = commands.add_parser(name, help=does, description=said.replace("%", "%%"), epilog=more)
    # Older Pythons, 3.11 among them, take a number such as -1e-3 for a flag; argparse has no public way to change it.
    parser._negative_number_matcher = NEGATIVE_NUMBER
    parser.set_defaults(run=run)
    return parser


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the argument BASE and the flag --revision."""
    parser.add_argument("base", metavar="BASE", help="base checkpoint: a folder, or a name on the hub")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a base on the hub")


def add_base_and_delta(parser: argparse.ArgumentParser) -> None:
    """Add the arguments BASE and DELTA, and the flags of their revisions."""
    add_base(parser)
    parser.add_argument("delta", metavar="DELTA", help="delta: a folder, or a name on the hub")
    parser.add_argument("--delta-revision", metavar="NAME", help="the same for a delta on the hub")


def add_merged(parser: argparse.ArgumentParser) -> None:
    """Add the argument MERGED."""
    parser.add_argument("merged", metavar="MERGED", help="folder of the merged checkpoint")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the argument OUT."""
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")


def add_model(parser: argparse.ArgumentParser, help: str, **more: Any) -> None:
    """Add the argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help=f"causal language model: {help}, or a name on the hub", **more)


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags --batch, --seq and --checkpointing of a training or warm-up step."""
    parser.add_argument("--batch", type=count, default=1, help="sequences that a device processes at a time")
    parser.add_argument("--seq", type=count, default=512, help="tokens per sequence; longer ones are cut")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of each layer")


def add_onto(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the flag --onto."""
    parser.add_argument("--onto", choices=("dequantized", "original"), help=f"for a delta of a quantised base: {help}")


def add_json(parser: argparse.ArgumentParser, keys: Mapping[str, str], more: str = "") -> None:
    """Add the flag --json, with the keys of the result and what they hold in its help."""
    text = f"print one JSON object instead. Its keys: {meanings(keys)}{more}."
    parser.add_argument("--json", action="store_true", help=text.replace("%", "%%"))


def meanings(keys: Mapping[str, str]) -> str:
    """Return the keys of a result, each with what it holds."""
    return "; ".join(f"{key} ({meaning})" for key, meaning in keys.items())


def leave_out_threads() -> None:
    """Keep numpy's BLAS from starting threads, which takes as long as importing numpy: for commands that multiply no
    matrices. Call it before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def add_config_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add a flag for each of the named fields, with the field's help."""
    for name, field in settings(SMTConfig).items():
        if name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", help=field.replace("%", "%%"), **field.kind.flag)


def given_fields(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the named fields that the command line gives, read and checked.

    Raises:
        SMTError: a value is out of range.
    """
    texts = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {name: settings(SMTConfig)[name].take(name, text) for name, text in texts.items()}


def count(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    return _within(int(text), 1, LARGEST)


def seed(text: str) -> int:
    """Parse a seed, for argparse."""
    return _within(int(text), 0, LARGEST)


def amount(text: str) -> float:
    """Parse a number above 0, for argparse; not NaN or infinite."""
    return _within(float(text), 2.0**-30, LARGEST)


def _within(number, lowest, highest):
    if not lowest <= number <= highest:
        raise argparse.ArgumentTypeError(f"must be from {lowest:g} to {highest:g}, got {number}")
    return number
