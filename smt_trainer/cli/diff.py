"""`smt diff A B`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from smt_trainer.cli.options import add_command, add_json
from smt_trainer.cli.output import fact, table, write

if TYPE_CHECKING:
    from smt_trainer.arithmetic.diff import BlockDiff, DeltaDiff

KEYS = {
    "same_base": "true, false, or null if the fingerprints do not tell",
    "names": "of the bases",
    "other_values": "tensors of the bases that differ",
    "modules": "module -> numbers of blocks in A (first), in B (second) and in both (shared), Jaccard index, norms of "
    "A - B (difference) and of A (values) over shared ones",
    "projections": "the same by projection",
    "total": "the same in all",
    "whole": "tensor -> norm of the difference, or null",
}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "diff",
        run,
        "compare two deltas: their base, their blocks and the values in shared ones",
        "relative is |A - B| / |A| over the shared blocks. As both start from the same base, A - B is also the "
        "difference of their changes.",
    )
    parser.add_argument("first", metavar="A", help="delta: a folder, or a name on the hub")
    parser.add_argument("second", metavar="B", help="another delta")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Print what two deltas have in common; see `diff_deltas`."""
    from smt_trainer.arithmetic.diff import diff_deltas

    found = diff_deltas(arguments.first, arguments.second)
    parts = {"modules": found.modules, "projections": found.projections}
    result = asdict(found) | {"total": _with_jaccard(found.total)}
    result |= {kind: {name: _with_jaccard(part) for name, part in own.items()} for kind, own in parts.items()}
    write(arguments, result, _lines(found))


def _lines(found: DeltaDiff) -> Iterator[str]:
    yield fact("base", _about_base(found))
    yield ""
    rows = {
        name: [
            *(f"{number:,}" for number in (part.first, part.second, part.shared)),
            f"{part.jaccard:.3f}",
            f"{part.difference:.4g}",
            f"{part.difference / part.values if part.values else 0.0:.2%}",
        ]
        for name, part in {**found.projections, "all": found.total}.items()
    }
    yield from table("projection first second shared Jaccard |A-B| relative".split(), rows)
    if found.whole:
        norms = [norm for norm in found.whole.values() if norm is not None]
        alone = len(found.whole) - len(norms)
        yield ""
        yield fact("whole", f"{len(norms)} tensors in both, |A-B| {math.hypot(*norms):.4g}; {alone} without match")


def _about_base(found: DeltaDiff) -> str:
    first, second = (name or "not recorded" for name in found.names)
    if found.same_base is None:
        return (
            f"{first} and {second}; their fingerprints, in other dtypes or samples, do not show whether values agree; "
            "smt merge checks for each delta whether a base is its own"
        )
    if found.same_base:
        return f"the same, {first}"
    others = f"{len(found.other_values)} tensors have other values, such as {found.other_values[0]}"
    return f"not the same, {first} and {second}: {others}"


def _with_jaccard(part: BlockDiff) -> dict:
    return asdict(part) | {"jaccard": part.jaccard}
