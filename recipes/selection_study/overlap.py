"""What two selections, or the scores behind them, have in common.

Of n blocks, two selections hold k each and i of them both. Their Jaccard index is i / (2k - i); if both were drawn at
random, i would be hypergeometric: P(i) = C(k, i) C(n - k, k - i) / C(n, k).
"""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from smt_trainer import BlockSelection


def jaccard(first: BlockSelection, second: BlockSelection) -> float:
    """Blocks in both selections over blocks in either."""
    ours, theirs = _blocks(first), _blocks(second)
    return len(ours & theirs) / len(ours | theirs)


def _blocks(selection: BlockSelection) -> set[tuple]:
    return {(name, *block) for name, indices in selection.block_indices.items() for block in indices.tolist()}


def chance(selection: BlockSelection) -> float:
    """The Jaccard index expected of two random selections as large as this one."""
    total = sum(grid.num_blocks for grid in selection.grids.values())
    chosen = selection.num_blocks
    return sum(
        math.exp(_log_choose(chosen, both) + _log_choose(total - chosen, chosen - both) - _log_choose(total, chosen))
        * both
        / (2 * chosen - both)
        for both in range(max(0, 2 * chosen - total), chosen + 1)
    )


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def rank_correlation(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Spearman's correlation of the scores of all blocks; equal scores share their mean rank."""
    ranks = [
        _ranks(np.concatenate([score.flatten().numpy() for score in scores.values()])) for scores in (first, second)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
