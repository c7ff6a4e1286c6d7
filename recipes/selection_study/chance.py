"""What two random selections have in common.

Of n blocks, two selections hold k each and i of them both. Their Jaccard index is i / (2k - i); if both are drawn at
random, i is hypergeometric: P(i) = C(k, i) C(n - k, k - i) / C(n, k).
"""

import math

from smt_trainer import BlockSelection


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
