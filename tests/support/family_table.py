"""Write the table of what the keywords of `target_modules` mean in each family of models.

`PYTHONPATH=.:tests/support python tests/support/family_table.py` writes it to `tests/contracts/families.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import transformers
from families import FAMILIES, SKIPPED, Family
from torch import nn

from smt_trainer import SMTConfig, SMTError
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.groups import LINEAR_KEYWORDS
from smt_trainer.model.kinds import is_linear, named_targets, weight_shape
from smt_trainer.model.language_model import find_language_model
from smt_trainer.model.names import by_projection
from smt_trainer.model.targets import count_parameters, find_targets

TABLE = Path(__file__).parents[1] / "contracts" / "families.md"
HEAD = """# Families of models

What the keywords of `target_modules` mean in each family, in transformers {version}: projections, their weights and the
share of the model that these are, in the tiny configurations of `tests/support/families.py`. A *+* stands for what the
columns before it have. Names in a list or a regular expression reach everything, also what no keyword means; in a model
of images and text, that is all beside its language model, too. Not tunable are weights that several modules share.
Only linears and experts are here.
Forward reads the weights marked *(read)* without calling their linears, so the warm-up leaves them out.
`tests/contracts/test_families.py` holds this table, and that a step moves the chosen blocks and nothing else.

| family | `qkv` | `attention` | `mlp` | `experts` | `all-linear` | no keyword |
|---|---|---|---|---|---|---|
"""
NONE, UNTUNABLE = "none", "not tunable"


def write() -> None:
    """Write the table of the installed transformers."""
    rows = [row(name, family) for name, family in FAMILIES.items()]
    skipped = [f"- {name}: {reason}" for name, reason in SKIPPED.items()]
    head = HEAD.format(version=transformers.__version__)
    TABLE.write_text(head + "\n".join(rows) + "\n\nNot here:\n\n" + "\n".join(skipped) + "\n")


def row(name: str, family: Family) -> str:
    """Return the row of a family."""
    model = family.build()
    found = {keyword: meant(model, keyword) for keyword in LINEAR_KEYWORDS}
    qkv, attention, mlp, _, everything = (found[keyword] or [] for keyword in LINEAR_KEYWORDS)
    inner = find_language_model(model) if family.is_composite else ""
    rest = [
        name
        for name, target in named_targets(model).items()
        if name not in everything and name.startswith(inner) and (is_linear(target) or isinstance(target, ExpertMatrix))
    ]
    cells = [
        cell(model, found["qkv"]),
        cell(model, found["attention"], qkv),
        cell(model, found["mlp"]),
        cell(model, found["experts"]),
        cell(model, found["all-linear"], [*attention, *mlp], family.read),
        projections(rest) or NONE,
    ]
    if inner:
        cells[-1] = f"all outside `{inner}`{f', {projections(rest)}' if rest else ''}"
    return f"| {name} | {' | '.join(cells)} |"


def meant(model: nn.Module, keyword: str) -> list[str] | None:
    """Return the targets of a keyword; None if it matches modules, none of which can be tuned."""
    try:
        return list(find_targets(model, SMTConfig(target_modules=keyword)))
    except SMTError as error:
        return None if "none of which can be tuned" in str(error) else []


def cell(model: nn.Module, names: list[str] | None, known: Iterable[str] = (), read: Iterable[str] = ()) -> str:
    """Return a cell: the projections of targets without the known ones, then the number and share of all weights."""
    if not names:
        return UNTUNABLE if names is None else NONE
    everything, known = named_targets(model), set(known)
    count = sum(math.prod(weight_shape(everything[name])) for name in names)
    more = projections([name for name in names if name not in known], read)
    listed = f"{'+ ' if known else ''}{more}".strip()
    return f"{listed}: {count:,} ({count / count_parameters(model):.0%})"


def projections(names: list[str], read: Iterable[str] = ()) -> str:
    """List the names of projections, marking those whose weight is only read."""
    return ", ".join(f"`{label}`{' (read)' if label in read else ''}" for label in by_projection(names))


if __name__ == "__main__":
    write()
