"""`smt diff A B`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smt_trainer.delta.diff import BlockDiff, DeltaDiff


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser(
        "diff",
        help="compare two deltas: their base, their blocks and the values in shared ones",
        epilog="relative is |A - B| / |A| over the blocks of both. As both start from the base, A - B is also the "
        "difference of their changes.",
    )
    parser.add_argument("first", help="delta folder A")
    parser.add_argument("second", help="delta folder B")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, module by module")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what two deltas have in common; see `diff_deltas`."""
    from smt_trainer.delta.diff import diff_deltas

    found = diff_deltas(arguments.first, arguments.second)
    if arguments.json:
        parts = {"modules": found.modules, "projections": found.projections}
        result = asdict(found) | {"total": _with_jaccard(found.total)}
        result |= {kind: {name: _with_jaccard(part) for name, part in own.items()} for kind, own in parts.items()}
        print(json.dumps(result, indent=2))
        return
    print(f"base         {_about_base(found)}\n")
    rows = {**found.projections, "all": found.total}
    width = max(map(len, [*rows, "projection"]))
    titles = "first second shared Jaccard |A-B| relative".split()
    print(f"{'projection':<{width}}" + "".join(f"{title:>10}" for title in titles))
    for name, part in rows.items():
        counts = "".join(f"{count:>10,}" for count in (part.first, part.second, part.shared))
        relative = part.difference / part.values if part.values else 0.0
        print(f"{name:<{width}}{counts}{part.jaccard:>10.3f}{part.difference:>10.4g}{relative:>10.2%}")
    if found.whole:
        norms = [norm for norm in found.whole.values() if norm is not None]
        alone = len(found.whole) - len(norms)
        print(f"\nwhole        {len(norms)} tensors in both, |A-B| {math.hypot(*norms):.4g}; {alone} in one or unlike")


def _about_base(found: DeltaDiff) -> str:
    from smt_trainer.errors import printable

    first, second = (name or "not recorded" for name in found.names)
    if found.same_base is None:
        return f"{first} and {second}; fingerprints of other samples do not tell whether their values agree"
    if found.same_base:
        return f"the same, {first}"
    others = f"{len(found.other_values)} tensors have other values, such as {printable(found.other_values[0])}"
    return f"not the same, {first} and {second}: {others}"


def _with_jaccard(part: BlockDiff) -> dict:
    return asdict(part) | {"jaccard": part.jaccard}
