"""Choose the blocks to train: scores and a budget give a `BlockSelection`.

`budget.py` decides how many blocks each group gives. Ranking is a stable sort, highest score first. The model's module
order breaks ties, then row order, so every rank and machine chooses the same blocks from the same scores. Under a cap,
each layer first offers its best blocks; the ranking then chooses among these.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.budget import BudgetGroup, budget_groups, check_budget_fits


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
    block_indices: dict[str, np.ndarray] = {}
    for group in budget_groups(grids, config, num_parameters):
        own = {name: score for name, score in scores.items() if name in group.grids}
        if not any(score.any() for score in own.values()):
            raise SMTError(
                f"all scores are zero for {group.label}, so no block is better than another. No gradient reached the "
                "targets: check that the labels are not all -100, and that the loss depends on the targeted modules."
            )
        chosen = _best_of_each(own, group) if config.scope == "per_module" else _best_of_all(own, group)
        block_indices |= {
            name: torch.stack(torch.unravel_index(blocks.sort().values, grids[name].shape), dim=1).numpy()
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
