"""The expected overlap of two random selections.

Two selections hold k of n blocks each and share i of them. Their Jaccard index is i / (2k - i). If both are random, i
is hypergeometric: P(i) = C(k, i) C(n - k, k - i) / C(n, k).
"""

import numpy as np
from scipy.stats import hypergeom

from smt_trainer import BlockSelection


def chance(selection: BlockSelection) -> float:
    """Return the expected Jaccard index of two random selections of this size."""
    total = sum(grid.num_blocks for grid in selection.grids.values())
    chosen = selection.num_blocks
    both = np.arange(max(0, 2 * chosen - total), chosen + 1)
    return float(hypergeom.pmf(both, total, chosen, chosen) @ (both / (2 * chosen - both)))
