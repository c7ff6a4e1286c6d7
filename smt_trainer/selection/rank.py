"""Blocks under a cap on the rank of a module's change.

Blocks that touch p rows and q columns of a weight change it by a matrix of rank min(p, q) at most: whatever its values,
it is a product B A in which B has p columns, or one in which B has q. Under a cap c, blocks of br x bc may lie in any
floor(c / br) block rows, or in any floor(c / bc) block columns.

A budget couples the modules in the search for the highest sum of scores s. A price t for each block, the Lagrange
multiplier of the budget, separates them: each keeps the block rows, or the block columns, in which the excess of its
scores over t, the sum of max(s - t, 0), is largest. Taking the lines of greatest excess, one by one, finds these, since
the excesses of lines in one direction just add up. Bisection raises t until the kept lines have just enough
blocks of at least t; from these the best are chosen as without a cap.

So a line counts by the blocks that the budget would pay for: not by its best block alone, which would spend lines on
single blocks, nor by the sum of all its scores, most of which the budget never reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from smt_trainer.model.grid import BlockGrid

# Each halves the range of prices, down to what float64 tells apart.
BISECTIONS = 60


def fits(grid: BlockGrid, blocks: Tensor, rank_cap: int) -> bool:
    """Return whether blocks at flat positions [n] of a grid touch at most `rank_cap` rows, or as many columns."""
    columns = grid.shape[1]
    return min(grid.touched(torch.stack([blocks // columns, blocks % columns], dim=1).numpy())) <= rank_cap


def in_best_lines(
    scores: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    rank_cap: int,
    is_enough: Callable[[dict[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """Return the scores with -inf outside the block rows, or block columns, that each module keeps.

    Args:
        scores: module name -> [R, C], finite and not all zero.
        grids: module name -> grid.
        rank_cap: the most rows or columns of a module's weight that its blocks may touch.
        is_enough: returns whether the blocks whose scores are not -inf meet the budget. It is called with the lines
            kept at a price, without the blocks that score less than the price.
    """
    exact = {name: score.double() for name, score in scores.items()}
    # At this price, whatever the scores, the direction with more blocks wins.
    low = -2.0 * (sum(score.abs().sum().item() for score in exact.values()) or 1.0)
    high = max(score.max().item() for score in exact.values())

    def kept(price: float, least: float) -> dict[str, Tensor]:
        masks = {name: best_lines(score, grids[name], rank_cap, price) for name, score in exact.items()}
        return {name: scores[name].masked_fill(~masks[name] | (exact[name] < least), -torch.inf) for name in scores}

    for _ in range(BISECTIONS):
        price = (low + high) / 2
        if is_enough(kept(price, price)):
            low = price
        else:
            high = price
    return kept(low, -torch.inf)


def best_lines(score: Tensor, grid: BlockGrid, rank_cap: int, price: float) -> Tensor:
    """Return a mask [R, C] of the block rows, or block columns, with the largest excess over a price; rows on ties."""
    excess = (score - price).clamp(min=0)
    options = []
    for direction, most in enumerate(grid.lines_within(rank_cap)):
        lines = excess.sum(1 - direction)
        best = torch.sort(lines, descending=True, stable=True).indices[:most]
        options.append((lines[best].sum().item(), direction, best))
    _, direction, best = max(options, key=lambda option: option[0])
    mask = torch.zeros(score.shape, dtype=torch.bool)
    return mask.index_fill_(direction, best, True)
