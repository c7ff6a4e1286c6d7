"""Fields of `SMTConfig` as options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from smt_trainer.config import (
    ACCUMULATOR_DEVICES,
    ACCUMULATOR_DTYPES,
    DENOMINATORS,
    GRANULARITIES,
    SCOPES,
    SCORE_ALIASES,
    SCORES,
    SMTConfig,
    parse_amount,
    parse_budget,
)

KINDS = {
    "target_modules": {"nargs": "+"},
    "exclude_modules": {"nargs": "+"},
    "budget_of": {"choices": DENOMINATORS},
    "granularity": {"choices": GRANULARITIES},
    "lowest_layer": {"type": int},
    "smt_warmup_steps": {"type": int},
    "accumulator_device": {"choices": ACCUMULATOR_DEVICES},
    "accumulator_dtype": {"choices": ACCUMULATOR_DTYPES},
    "score": {"choices": (*SCORES, *SCORE_ALIASES)},
    "scope": {"choices": SCOPES},
}


def add_config_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add an option for each of the named fields, with the field's help."""
    for field in fields(SMTConfig):
        if field.name in names:
            text, flag = field.metadata["help"].replace("%", "%%"), f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, help=text, **KINDS.get(field.name, {}))


def given_fields(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The named fields that were given on the command line, as `SMTConfig` takes them.

    Raises:
        SMTError: a budget or a cap is no number.
    """
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name, value in given.items():
        if name in ("target_modules", "exclude_modules") and len(value) == 1:
            given[name] = value[0]
        elif name == "budget":
            given[name] = parse_budget(value)
        elif name == "layer_cap":
            given[name] = parse_amount(name, value)
        elif name == "block_size" and value.isdigit():
            given[name] = int(value)
    return given
