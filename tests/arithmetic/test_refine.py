"""Blocks are cut into finer ones without changing a value."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import some_blocks

from smt_trainer import BlockSelection, SMTConfig
from smt_trainer.arithmetic.refine import on_one_grid
from smt_trainer.delta.delta import Delta
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.grid import BlockGrid


def delta_of(grid, indices):
    """Return a delta with the numbers 1, 2, ... in its blocks."""
    count = grid.out_features * grid.in_features
    values = np.arange(1, len(indices) * grid.block_numel + 1, dtype=np.float32).reshape(-1, *grid.block_shape)
    order = np.lexsort(indices.T[::-1])
    selection = BlockSelection({"a": grid}, {"a": indices[order]}, count, SMTConfig())
    return Delta(selection, {"a": values}, {}, Fingerprint("float32", 64, {}), "float32")


def dense(delta):
    """Return the weight that has the blocks of a delta, and zeros."""
    grid = delta.selection.grids["a"]
    weight = np.zeros(grid.stored_shape, np.float32)
    grid.split(weight)[tuple(delta.selection.block_indices["a"].T)] = delta.block_arrays["a"]
    return weight


@given(drawn=some_blocks(), data=st.data())
def test_refined_blocks_are_the_same_weights(drawn, data):
    small, indices = drawn
    edges = st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (2, 3)])
    up, down = data.draw(edges), data.draw(edges)
    # So large that the finest common blocks have the smallest size at least.
    rows, columns = small.block_rows * 6, small.block_columns * 48
    out, into = small.shape[0] * rows, small.shape[1] * columns
    grids = [BlockGrid(out, into, rows // edge[0], columns // edge[1], small.transposed) for edge in (up, down)]
    deltas = [delta_of(grid, indices.numpy()) for grid in grids]
    refined = on_one_grid(deltas)
    assert refined[0].selection.grids == refined[1].selection.grids
    for before, after in zip(deltas, refined, strict=True):
        assert np.array_equal(dense(before), dense(after))
        flat = np.ravel_multi_index(tuple(after.selection.block_indices["a"].T), after.selection.grids["a"].shape)
        assert (np.diff(flat) > 0).all()
