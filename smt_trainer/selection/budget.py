"""Turn a budget into the number of blocks to choose from each target, and check that the targets hold them.

A fraction f refers to D weights: the P parameters of the model, or the T weights of all targets (`budget_of`). It asks
for f * D weights; k blocks of m weights each are chosen, with k * m as near to f * D as whole blocks allow. A count
asks for k blocks. Budgets by group (SMT, tables 4 and 6) make one `BudgetGroup` each, which is ranked apart from the
others and meets its own budget.

With `scope="per_module"`, a count applies to each module, and f * D is divided in proportion to the modules' sizes.
`layer_cap` limits each layer to n blocks, or to a fraction of the layer's weights in the group. Each layer then offers
only its best blocks up to the cap, so the targets hold less. The same is true of `rank_cap`, which limits each module
to some of its block rows, or to some of its block columns (see `rank.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid, numel
from smt_trainer.model.groups import in_group
from smt_trainer.model.names import layer_path
from smt_trainer.settings import PERCENT

PIECES = {"block": "blocks", "row": "rows", "column": "columns"}


@dataclass(frozen=True)
class BudgetGroup:
    """Targets that are ranked together, and how many of their blocks or weights to choose.

    Attributes:
        label: the budget's name in errors, such as "budget=0.0084" or "budget['mlp']=100".
        grids: module name -> grid, in the model's order.
        config: the configuration that sets the budget.
        count: number of blocks asked for (of each module if scope is 'per_module'); 0 for a fraction.
        weights: number of weights asked for; None for a count.
        denominator: weights that the fraction refers to.
    """

    label: str
    grids: dict[str, BlockGrid]
    config: SMTConfig
    count: int
    weights: float | None
    denominator: int

    def layers(self) -> dict[str, list[str]]:
        """Return layer -> the names of its targets; "" for targets outside the layers."""
        layers: dict[str, list[str]] = {}
        for name in self.grids:
            layers.setdefault(layer_path(name), []).append(name)
        return layers

    def most_blocks(self, name: str) -> int:
        """Return the most blocks that may be chosen from one target, as far as `rank_cap` allows."""
        grid, cap = self.grids[name], self.config.rank_cap
        if cap is None:
            return grid.num_blocks
        (rows, columns), (most_rows, most_columns) = grid.shape, grid.lines_within(cap)
        return max(most_rows * columns, most_columns * rows)

    def cap(self, names: Iterable[str]) -> tuple[int, int]:
        """Return the most blocks and the most weights that `layer_cap` allows in one layer with these targets."""
        cap, total = self.config.layer_cap, numel(self.grids[name] for name in names)
        blocks = sum(self.grids[name].num_blocks for name in names)
        if cap is None:
            return blocks, total
        # Compute in decimals, as written: 0.29 of 100 weights is 28.999... in floating point.
        return (min(cap, blocks), total) if isinstance(cap, int) else (blocks, int(Fraction(str(cap)) * total))

    def quotas(self) -> dict[str, int]:
        """Return each module's number of blocks: the count, or a share by size, rounded by largest remainder."""
        if self.weights is None:
            return dict.fromkeys(self.grids, self.count)
        fraction = min(1.0, self.weights / numel(self.grids.values()))
        exact = {name: fraction * grid.num_blocks for name, grid in self.grids.items()}
        quotas = {name: int(part) for name, part in exact.items()}
        left = max(1, round(sum(exact.values()))) - sum(quotas.values())
        for name in sorted(exact, key=lambda name: quotas[name] - exact[name])[:left]:
            quotas[name] += 1
        return quotas

    def check_room(self, blocks: int, weights: float) -> None:
        """Raise `SMTError` unless `blocks` blocks with `weights` weights in all can meet the budget."""
        caps = {name: getattr(self.config, name) for name in ("layer_cap", "rank_cap")}
        caps = {name: cap for name, cap in caps.items() if cap is not None}
        capped = f" under {' and '.join(f'{name}={cap}' for name, cap in caps.items())}" if caps else ""
        remedies = ["Lower the budget", *([f"raise {name}" for name in caps] or ["widen target_modules"])]
        remedy = f"{' or '.join(remedies)}; {PERCENT}."
        if self.weights is not None:
            largest = max(grid.block_numel for grid in self.grids.values())
            if self.weights > weights + largest / 2 or not blocks:
                raise SMTError(
                    f"{self.label} of {self.denominator:,} {_whose(self.config)} is more than the targets hold{capped} "
                    f"({int(weights):,} weights, {weights / self.denominator:.4f} of the {self.config.budget_of}). "
                    f"{remedy}"
                )
        elif self.count > blocks:
            pieces = PIECES[self.config.granularity]
            raise SMTError(f"{self.label} {pieces} is more than the targets hold{capped} ({blocks}). {remedy}")


def budget_groups(grids: Mapping[str, BlockGrid], config: SMTConfig, num_parameters: int) -> list[BudgetGroup]:
    """Make the budget's groups: one of all targets, or one for each group that the budget names.

    Args:
        grids: module name -> grid, for every target.
        config: its `budget`, `budget_of`, `scope` and caps are read.
        num_parameters: parameters of the whole model.

    Raises:
        SMTError: a target belongs to no group or to several, or a group has no target.
    """
    denominator = num_parameters if config.budget_of == "model" else numel(grids.values())
    if not isinstance(config.budget, dict):
        return [_group(f"budget={config.budget}", dict(grids), config, config.budget, denominator)]
    members: dict[str, dict[str, BlockGrid]] = {group: {} for group in config.budget}
    strays: dict[str, list[str]] = {}
    for name, grid in grids.items():
        found = [group for group in members if in_group(name, group)]
        if len(found) == 1:
            members[found[0]][name] = grid
        else:
            strays[name] = found
    if strays:
        listed = "; ".join(f"`{name}` to {' and '.join(found) or 'none'}" for name, found in list(strays.items())[:4])
        raise SMTError(
            f"every target must belong to exactly one group of the budget ({', '.join(members)}): {listed}"
            f"{f'; and {len(strays) - 4} more' if len(strays) > 4 else ''}. Add a group, or leave modules out with "
            "exclude_modules."
        )
    for group, own in members.items():
        if not own:
            raise SMTError(
                f"budget has a group {group!r}, but none of the {len(grids)} targets of "
                f"target_modules={config.target_modules!r} belongs to it. Widen target_modules or drop the group."
            )
    return [
        _group(f"budget[{group!r}]={amount}", members[group], config, amount, denominator)
        for group, amount in config.budget.items()
    ]


def check_budget_fits(grids: Mapping[str, BlockGrid], config: SMTConfig, num_parameters: int) -> None:
    """Raise `SMTError` if a group asks for less than half a block, or for more than its targets hold under the cap."""
    for group in budget_groups(grids, config, num_parameters):
        if not any(map(group.most_blocks, group.grids)):
            shape = "x".join(map(str, next(iter(group.grids.values())).block_shape))
            raise SMTError(
                f"rank_cap={config.rank_cap} is less than either edge of a block ({shape}), so no block fits. Raise "
                "rank_cap, or use a smaller block_size."
            )
        smallest = min(grid.block_numel for grid in group.grids.values())
        if group.weights is not None and group.weights < smallest / 2:
            raise SMTError(
                f"{group.label} of {group.denominator:,} {_whose(config)} is {group.weights:.0f} weights, less than "
                f"half a block of {smallest:,}. Use at least {smallest / group.denominator:.2g}, or a smaller "
                "block_size."
            )
        if config.scope == "per_module":
            _check_modules(group)
        else:
            rooms = [_room(group, names) for names in group.layers().values()]
            group.check_room(sum(blocks for blocks, _ in rooms), sum(weights for _, weights in rooms))


def _group(
    label: str, grids: dict[str, BlockGrid], config: SMTConfig, budget: float | int, denominator: int
) -> BudgetGroup:
    counted = isinstance(budget, int)
    return BudgetGroup(
        label, grids, config, budget if counted else 0, None if counted else budget * denominator, denominator
    )


def _check_modules(group: BudgetGroup) -> None:
    """Check a group as `check_budget_fits` does, with `scope="per_module"`: each module has its own quota."""
    quotas, pieces = group.quotas(), PIECES[group.config.granularity]
    if group.weights is not None:
        weights = sum(group.most_blocks(name) * grid.block_numel for name, grid in group.grids.items())
        group.check_room(sum(quotas.values()), weights)
    for name, grid in group.grids.items():
        most, cap = group.most_blocks(name), group.config.rank_cap
        if quotas[name] > most:
            capped = most < grid.num_blocks
            raise SMTError(
                f"{group.label} {pieces} of each module is more than `{name}` holds: a weight of "
                f"{'x'.join(map(str, grid.weight_shape))} has {most} {pieces}{f' under rank_cap={cap}' * capped}. "
                f"Lower the budget{', raise rank_cap' * capped} or exclude the module."
            )
    for layer, names in group.layers().items():
        blocks, weights = group.cap(names)
        wanted = sum(quotas[name] for name in names)
        if wanted > blocks or sum(quotas[name] * group.grids[name].block_numel for name in names) > weights:
            raise SMTError(
                f"{group.label} with scope='per_module' takes {wanted} {pieces} of `{layer}`, more than "
                f"layer_cap={group.config.layer_cap} allows. Lower the budget or raise layer_cap."
            )


def _room(group: BudgetGroup, names: list[str]) -> tuple[int, int]:
    """Return the most blocks and the most weights that a layer can give under the caps, whatever the scores."""
    blocks, weights = group.cap(names)
    sizes = Counter()
    for name in names:
        sizes[group.grids[name].block_numel] += group.most_blocks(name)
    # For most blocks, take the smallest first; for most weights, the largest first, in steps of their common divisor.
    step = math.gcd(*sizes)
    most_blocks, most_weights, left = 0, 0, weights
    for size in sorted(sizes):
        taken = min(sizes[size], left // size)
        most_blocks, left = most_blocks + taken, left - taken * size
    left = blocks
    for size in sorted(sizes, reverse=True):
        taken = min(sizes[size], left)
        most_weights, left = most_weights + taken * size, left - taken
    return min(blocks, most_blocks), min(most_weights, weights // step * step)


def _whose(config: SMTConfig) -> str:
    return "parameters" if config.budget_of == "model" else "targeted weights"
