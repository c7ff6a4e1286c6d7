"""Fields of `SMTConfig` as flags of a command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from smt_trainer.config import SMTConfig
from smt_trainer.settings import settings

LARGEST = 2**31


def count(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    return _within(int(text), 1, LARGEST)


def seed(text: str) -> int:
    """Parse a seed, for argparse."""
    return _within(int(text), 0, LARGEST)


def amount(text: str) -> float:
    """Parse a number above 0, for argparse; not NaN or infinite."""
    return _within(float(text), 2.0**-30, LARGEST)


def add_base_and_delta(parser: argparse.ArgumentParser, third: str, help: str) -> None:
    """Add the arguments BASE and DELTA, a third one, and the flag --revision."""
    parser.add_argument("base", help="base checkpoint: a folder, or a name on the hub")
    parser.add_argument("delta", help="delta folder")
    parser.add_argument(third, help=help)
    parser.add_argument("--revision", help="revision of a base on the hub")


def add_onto(parser: argparse.ArgumentParser) -> None:
    """Add the flag --onto."""
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="for a delta of a quantised base: its dequantised weights, or the weights that it was made of",
    )


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


def _within(number, lowest, highest):
    if not lowest <= number <= highest:
        raise argparse.ArgumentTypeError(f"must be from {lowest:g} to {highest:g}, got {number}")
    return number
