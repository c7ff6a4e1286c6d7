"""Choose the blocks to train: scores and a budget give a `BlockSelection`, an artefact that can be saved and reused.

`budget.py` decides how many blocks each group gives. Ranking is a stable sort, highest score first. The model's module
order breaks ties, then row order, so every rank and machine chooses the same blocks from the same scores. Under a cap,
each layer first offers its best blocks; the ranking then chooses among these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.files import load_json, write_text
from smt_trainer.manifest import check_format, check_keys, read_base, read_config, refusing_damage, sealed, unsealed
from smt_trainer.model.grid import BlockGrid, read_grids
from smt_trainer.model.names import by_projection
from smt_trainer.selection.budget import BudgetGroup, budget_groups, check_budget_fits
from smt_trainer.settings import is_int

SELECTION_FILE = "smt_selection.json"
FORMAT = 1
KEYS = {"format", "base_model", "num_parameters", "config", "modules"}


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The chosen blocks of a model.

    Attributes:
        grids: module name -> grid, for every target, in the model's order.
        block_indices: module name -> [n, 2] int64 (row, column), row by row; only modules with chosen blocks.
        num_parameters: parameters of the whole model, tied weights counted once.
        config: the configuration that chose them.
        base_model: name of the model they were chosen for, if known.
    """

    grids: dict[str, BlockGrid]
    block_indices: dict[str, Tensor]
    num_parameters: int
    config: SMTConfig
    base_model: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.block_indices) - set(self.grids))
        if unknown:
            raise SMTError(f"the selection has blocks for `{unknown[0]}` but no grid; it is damaged, create it again.")
        for name, indices in self.block_indices.items():
            self.grids[name].check_indices(indices, name)
        if not self.num_blocks:
            raise SMTError("the selection holds no block; there is nothing to train. Raise the budget.")

    @property
    def num_blocks(self) -> int:
        """Number of chosen blocks in all modules together."""
        return sum(len(indices) for indices in self.block_indices.values())

    @property
    def trainable_parameters(self) -> int:
        """Number of weights in the chosen blocks."""
        return sum(len(indices) * self.grids[name].block_numel for name, indices in self.block_indices.items())

    @property
    def fraction_of_model(self) -> float:
        """Trainable weights as a fraction of all parameters of the model (the papers' #Params%, as a fraction)."""
        return self.trainable_parameters / self.num_parameters

    @property
    def fraction_of_targets(self) -> float:
        """Trainable weights as a fraction of the targeted weights."""
        return self.trainable_parameters / sum(grid.num_blocks * grid.block_numel for grid in self.grids.values())

    def blocks_by_projection(self) -> dict[str, int]:
        """Return projection (`v_proj`) -> number of chosen blocks, including projections without any."""
        return {
            projection: sum(len(self.block_indices.get(name, ())) for name in names)
            for projection, names in by_projection(self.grids).items()
        }

    def summary(self) -> str:
        """Describe the selection in one line: blocks and their shape, parameters, fractions, projections."""
        shapes = {grid.block_shape for grid in self.grids.values()}
        shape = "{}x{}".format(*shapes.pop()) if len(shapes) == 1 else "several shapes"
        shares = ", ".join(f"{leaf} {count}" for leaf, count in self.blocks_by_projection().items())
        return (
            f"{self.num_blocks:,} blocks of {shape} ({self.trainable_parameters:,} parameters): "
            f"{self.fraction_of_model:.3%} of the model, {self.fraction_of_targets:.3%} of the targets; {shares}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types that `from_dict` reads back."""
        config = self.config.to_dict() | {"selection": None}
        modules = {
            name: grid.to_dict()
            | {"block_indices": self.block_indices[name].tolist() if name in self.block_indices else []}
            for name, grid in self.grids.items()
        }
        return {
            "format": FORMAT,
            "base_model": self.base_model,
            "num_parameters": self.num_parameters,
            "config": config,
            "modules": modules,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockSelection:
        """Inverse of `to_dict`. Raises `SMTError` when a part is missing, malformed or out of range."""
        with refusing_damage("selection"):
            check_format(values, FORMAT, "selection")
            values = unsealed(values, "selection")
            check_keys(values, KEYS, "selection")
            grids = read_grids(values["modules"], values["num_parameters"])
            block_indices = {
                name: _read_indices(module["block_indices"], name)
                for name, module in values["modules"].items()
                if module["block_indices"] != []
            }
            return cls(grids, block_indices, values["num_parameters"], read_config(values), read_base(values))

    def save(self, path: str | Path) -> None:
        """Write the selection as JSON with a checksum, atomically."""
        write_text(Path(path), json.dumps(sealed(self.to_dict())))

    @classmethod
    def load(cls, path: str | Path) -> BlockSelection:
        """Read what `save` wrote. Raises `SMTError` for a missing or damaged file.

        A file that was written by hand needs no checksum.
        """
        return cls.from_dict(load_json(Path(path), "selection"))

    @classmethod
    def resolve(cls, selection: BlockSelection | Mapping[str, Any] | str | Path) -> BlockSelection:
        """Return a selection given as itself, as its dictionary or as the path of its file."""
        if isinstance(selection, BlockSelection):
            return selection
        return cls.from_dict(selection) if isinstance(selection, Mapping) else cls.load(selection)


def _read_indices(rows: Any, module: str) -> Tensor:
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 2 and all(map(is_int, row)) for row in rows
    ):
        raise SMTError(f"block_indices of `{module}` must be pairs of whole numbers. The selection is damaged.")
    return torch.tensor(rows)


def base_name(model: nn.Module) -> str | None:
    """Return the model's hub name, with its revision if known (`name@commit`); for a local base, the folder's name.

    A model that a delta was merged into has no name: it is no longer the base that it was loaded from.
    """
    if getattr(model, "smt_merged", False):
        return None
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    if Path(name).exists():
        return Path(name).resolve().name
    revision = getattr(config, "_commit_hash", None)
    return f"{name}@{revision}" if revision else name


def select_blocks(
    scores: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    config: SMTConfig,
    num_parameters: int,
    base_model: str | None = None,
) -> BlockSelection:
    """Choose the highest-scoring blocks within the budget (SMT, section 3.2).

    Args:
        scores: module name -> [R, C], in the model's module order.
        grids: module name -> grid.
        config: its `budget`, `budget_of`, `scope` and `layer_cap` are read (see `budget.py`).
        num_parameters: parameters of the whole model.
        base_model: name recorded in the selection.

    Raises:
        SMTError: a score is NaN or infinite, all scores that are ranked together are zero, or the budget does not fit
            the targets.
    """
    for name, score in scores.items():
        if not score.isfinite().all():
            raise SMTError(
                f"the scores of `{name}` are not finite. Gradients overflowed in the warm-up: check the data for "
                "batches without labels, or run the warm-up in bf16 or float32."
            )
    check_budget_fits(grids, config, num_parameters)
    block_indices: dict[str, Tensor] = {}
    for group in budget_groups(grids, config, num_parameters):
        own = {name: score for name, score in scores.items() if name in group.grids}
        if not any(score.any() for score in own.values()):
            raise SMTError(
                f"all scores are zero for {group.label}, so no block is better than another. No gradient reached the "
                "targets: check that the labels are not all -100, and that the loss depends on the targeted modules."
            )
        chosen = _best_of_each(own, group) if config.scope == "per_module" else _best_of_all(own, group)
        block_indices |= {
            name: torch.stack(torch.unravel_index(blocks.sort().values, grids[name].shape), dim=1)
            for name, blocks in chosen.items()
            if len(blocks)
        }
    in_order = {name: block_indices[name] for name in grids if name in block_indices}
    return BlockSelection(dict(grids), in_order, num_parameters, config, base_model)


def _best_of_all(scores: Mapping[str, Tensor], group: BudgetGroup) -> dict[str, Tensor]:
    """Return module name -> flat positions of its blocks among the best of all modules together."""
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    counts = torch.tensor([group.grids[name].num_blocks for name in scores])
    numels = torch.tensor([group.grids[name].block_numel for name in scores], dtype=torch.float64)
    available = len(flat)
    if group.config.layer_cap is not None:
        allowed = _best_of_each_layer(flat, counts, numels, list(scores), group)
        flat, available = flat.masked_fill(~allowed, -torch.inf), int(allowed.sum())
        # If a layer has blocks of several sizes, the scores decide how much it can give.
        group.check_room(available, float(numels.repeat_interleave(counts)[allowed].sum()))
    if group.weights is not None:
        best = _best(flat, min(available, int(group.weights / numels.min()) + 1))
        sizes = numels[torch.bucketize(best, counts.cumsum(0), right=True)]
        # Take the k highest-scoring blocks whose total size is nearest to the budget, at least one.
        best = best[: max(1, int((sizes.cumsum(0) - sizes / 2 <= group.weights).sum()))]
    else:
        best = _best(flat, group.count)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[best] = True
    return {name: part.nonzero().flatten() for name, part in zip(scores, chosen.split(counts.tolist()), strict=True)}


def _best_of_each_layer(flat: Tensor, counts: Tensor, numels: Tensor, names: list[str], group: BudgetGroup) -> Tensor:
    """Return a mask over `flat`, True at each layer's best blocks up to its cap."""
    allowed = torch.zeros(len(flat), dtype=torch.bool)
    places = {name: place for place, name in enumerate(names)}
    positions_of = torch.arange(len(flat)).split(counts.tolist())
    for members in group.layers().values():
        mine = sorted(places[name] for name in members)
        positions = torch.cat([positions_of[place] for place in mine])
        blocks, weights = group.cap(members)
        best = torch.sort(flat[positions], descending=True, stable=True).indices
        taken = numels[mine].repeat_interleave(counts[mine])[best].cumsum(0) <= weights
        allowed[positions[best[taken][:blocks]]] = True
    return allowed


def _best(flat: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` >= 1 highest scores, best first, ties in order; sort only these."""
    cutoff = len(flat) - count
    lowest = np.partition(flat.numpy(), cutoff)[cutoff].item()
    candidates = (flat >= lowest).nonzero().flatten()
    return candidates[torch.sort(flat[candidates], descending=True, stable=True).indices[:count]]


def _best_of_each(scores: Mapping[str, Tensor], group: BudgetGroup) -> dict[str, Tensor]:
    """Return module name -> flat positions of its own best blocks, as many as its quota."""
    quotas = group.quotas()
    return {name: _best(score.flatten().float(), quotas[name]) for name, score in scores.items() if quotas[name]}
