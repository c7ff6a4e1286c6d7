"""How every command writes its result to standard output: lines for people, or with --json one object for machines.

Unprintable characters, which may come from a file, are escaped in lines. Numbers that JSON lacks (NaN, infinity) become
null. All other output of `smt` (log, errors) goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smt_trainer.errors import printable

if TYPE_CHECKING:
    from smt_trainer.selection.block_selection import BlockSelection

COLUMN = 10
# What `blocks` gives, for the help.
BLOCKS = "number of blocks, their parameters, fractions of model and targets, and numbers by projection"
OUTPUT = "the folder written"


def write(arguments: argparse.Namespace, result: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print a result: the lines, or the object if the arguments say --json."""
    if arguments.json:
        print(json.dumps(_standard(result), indent=2, allow_nan=False))
        return
    for line in lines:
        print(printable(line))


def fact(name: str, text: str) -> str:
    """Return a line with a name and what there is to say of it."""
    return f"{name:<13}{text}"


def table(titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: names at the left, the other columns flush right.

    Args:
        titles: of all columns, that of the names first.
        rows: name -> its cells.
    """
    cells = [titles, *([name, *row] for name, row in rows.items())]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *row in cells:
        right = "".join(f"  {cell:>{max(width, COLUMN - 2)}}" for cell, width in zip(row, others, strict=True))
        yield f"{name:<{first}}{right}"


def blocks(selection: BlockSelection) -> dict[str, Any]:
    """Return the numbers of a selection for a result; see `BLOCKS`."""
    return {
        "blocks": selection.num_blocks,
        "parameters": selection.trainable_parameters,
        "of_model": selection.fraction_of_model,
        "of_targets": selection.fraction_of_targets,
        "projections": selection.blocks_by_projection(),
    }


def _standard(value: Any) -> Any:
    """Return a value with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _standard(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
