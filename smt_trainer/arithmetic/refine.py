"""Cut the blocks of several deltas onto the same grids, so that they can be compared. Imports no torch.

Blocks of br x bc and of br' x bc' weights are both made of whole blocks of gcd(br, br') x gcd(bc, bc'): the coarsest
common refinement of the two grids. Values stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from smt_trainer.delta.delta import Delta
from smt_trainer.errors import SMTError
from smt_trainer.merging.site import cut_blocks
from smt_trainer.model.grid import BlockGrid

# The fewest weights in a block. In smaller ones, the position, 8 bytes, would take about as much as the values.
SMALLEST = 8


def on_one_grid(deltas: Sequence[Delta]) -> list[Delta]:
    """Return the deltas with the same grids, of all their targets, with blocks as small as each needs.

    Raises:
        SMTError: a weight has different shapes in two deltas, or its common blocks have fewer than `SMALLEST` weights.
    """
    grids: dict[str, BlockGrid] = {}
    for delta in deltas:
        for name, grid in delta.selection.grids.items():
            grids[name] = _common(name, grids.get(name, grid), grid)
    return [_refined(delta, grids) for delta in deltas]


def _common(name: str, first: BlockGrid, second: BlockGrid) -> BlockGrid:
    if (first.weight_shape, first.transposed) != (second.weight_shape, second.transposed):
        raise SMTError(
            f"`{name}` is {list(first.stored_shape)} in one delta and {list(second.stored_shape)} in another. Give "
            "deltas of one base."
        )
    rows, columns = map(math.gcd, first.block_shape, second.block_shape)
    common = replace(first, block_rows=rows, block_columns=columns)
    if first != second and common.block_numel < SMALLEST:
        raise SMTError(
            f"the blocks of `{name}` are {_in_words(first)} in one delta and {_in_words(second)} in another; common "
            f"ones would be {_in_words(common)}, fewer than {SMALLEST} weights. Extract one of them again from its "
            "merged checkpoint (smt merge, smt extract), with the granularity and block_size of the other."
        )
    return common


def _refined(delta: Delta, grids: dict[str, BlockGrid]) -> Delta:
    selection, indices, blocks = delta.selection, {}, {}
    for name, found in selection.block_indices.items():
        indices[name], blocks[name] = cut_blocks(selection.grids[name], grids[name], found, delta.block_arrays[name])
    in_order = {name: indices[name] for name in grids if name in indices}
    return replace(delta, selection=replace(selection, grids=dict(grids), block_indices=in_order), block_arrays=blocks)


def _in_words(grid: BlockGrid) -> str:
    return "{}x{}".format(*grid.block_shape)
