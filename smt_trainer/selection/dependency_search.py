"""Search a model for rows and columns that depend on each other (`dependencies.py`), in few forward passes.

In a pass, the layers all output noise, except that the outputs in a set S are 0 (`noise.py`). The columns that are then
0 everywhere depend on a member of S. Let S_b hold the outputs whose index has bit b set, and T_b the others. A column
with one row turns 0 under exactly one of S_b and T_b for each b, which spells the row's index. A column with several
rows, as behind a fused gate and up projection, turns 0 under both for some b; the search repeats for it in each half of
the outputs. So 2 log2 n passes suffice for the n outputs of the linears of one kind in all layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import named_linears_and_convolutions
from smt_trainer.model.targets import target_grids
from smt_trainer.selection.noise import layers_output_noise


@dataclass(frozen=True, eq=False)
class Dependency:
    """The rows of a linear and the columns of another that depend on each other.

    Attributes:
        source: full name of the linear with the rows.
        reader: full name of the linear with the columns.
        pairs: [n, 2] int32 (row of the source, column of the reader), by row, then column; a row may have several
            columns, a column several rows.
        grid: the reader's grid of columns.
    """

    source: str
    reader: str
    pairs: Tensor
    grid: BlockGrid


def all_dependencies(model: nn.Module) -> list[Dependency]:
    """Find the dependencies between any two layers of a model, by source and reader in the model's order."""
    linears = named_linears_and_convolutions(model)
    grids = target_grids(linears, SMTConfig(granularity="column"))
    kinds: dict[str, list[str]] = {}
    for name in linears:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    found = []
    with layers_output_noise(model, linears, grids) as zero_columns:
        alive = {name: ~zero for name, zero in zero_columns({}).items()}
        for kind in kinds.values():
            # Output i of the k-th of these K linears has index i * K + k: a range of indices is a range in each linear.
            rows = max(grids[name].out_features for name in kind)

            def turned_zero(outputs: Tensor, kind=kind, rows=rows) -> dict[str, Tensor]:
                of_each = outputs.view(rows, len(kind)).unbind(1)
                zeros = {name: own[: grids[name].out_features] for name, own in zip(kind, of_each, strict=True)}
                return {name: alive[name] & zero for name, zero in zero_columns(zeros).items() if name in alive}

            for reader, columns, indices in _search(turned_zero, alive, range(rows * len(kind)), rows * len(kind)):
                for place in (indices % len(kind)).unique().tolist():
                    own = indices % len(kind) == place
                    pairs = torch.stack([indices[own] // len(kind), columns[own]], dim=1)
                    found.append((kind[place], reader, pairs))
    return _join(found, grids)


def _search(
    turned_zero: Callable[[Tensor], dict[str, Tensor]], asked: Mapping[str, Tensor], among: range, count: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, columns [n], indices [n]): the `asked` columns and the outputs in `among` they depend on."""
    index = torch.arange(count)
    members = (index >= among.start) & (index < among.stop)
    found = {name: zero & asked[name] for name, zero in turned_zero(members).items() if name in asked}
    found = {name: columns for name, columns in found.items() if columns.any()}
    if not found:
        return
    spelled = {name: columns.clone() for name, columns in found.items()}
    several = {name: torch.zeros_like(columns) for name, columns in found.items()}
    word = {name: torch.full(columns.shape, among.start) for name, columns in found.items()}
    for bit in range((len(among) - 1).bit_length()):
        is_set = ((index - among.start) >> bit) % 2 == 1
        under_set, under_unset = turned_zero(members & is_set), turned_zero(members & ~is_set)
        for name, columns in found.items():
            spelled[name] &= under_set[name] ^ under_unset[name]
            several[name] |= columns & under_set[name] & under_unset[name]
            word[name] += under_set[name].long() << bit
    for name, columns in spelled.items():
        if columns.any():
            yield name, columns.nonzero().flatten(), word[name][columns]
    middle = (among.start + among.stop) // 2
    if any(columns.any() for columns in several.values()):
        for half in (range(among.start, middle), range(middle, among.stop)):
            yield from _search(turned_zero, several, half, count)


def _join(found: list[tuple[str, str, Tensor]], grids: Mapping[str, BlockGrid]) -> list[Dependency]:
    """Make one dependency per source and reader, in the model's order."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for source, reader, pairs in found:
        parts.setdefault((source, reader), []).append(pairs)
    names = {name: place for place, name in enumerate(grids)}
    joined = []
    for source, reader in sorted(parts, key=lambda ends: [names[end] for end in ends]):
        pairs = torch.cat(parts[source, reader])
        pairs = pairs[(pairs[:, 0] * grids[reader].num_blocks + pairs[:, 1]).argsort()]
        joined.append(Dependency(source, reader, pairs.int(), grids[reader]))
    return joined
