"""The expected overlap of two random selections.

Two selections hold k of n blocks each and share i of them. Their Jaccard index is i / (2k - i). If both are random, i
is hypergeometric: P(i) = C(k, i) C(n - k, k - i) / C(n, k).
"""

import math

from smt_trainer import BlockSelection


def chance(selection: BlockSelection) -> float:
    """Return the expected Jaccard index of two random selections of this size."""
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
