"""Hypothesis strategies for grids and blocks."""

import torch
from hypothesis import strategies as st

from smt_trainer.model.grid import BlockGrid


@st.composite
def grids(draw) -> BlockGrid:
    """Draw a grid of up to 5x5 blocks of up to 4x4, of a weight stored either way."""
    (rows, columns), (br, bc) = (draw(st.tuples(*[st.integers(1, most)] * 2)) for most in (5, 4))
    return BlockGrid(rows * br, columns * bc, br, bc, transposed=draw(st.booleans()))


@st.composite
def some_blocks(draw) -> tuple[BlockGrid, torch.Tensor]:
    """Draw a grid and some of its blocks, in any order."""
    grid = draw(grids())
    chosen = draw(st.lists(st.integers(0, grid.num_blocks - 1), min_size=1, unique=True))
    return grid, torch.stack(torch.unravel_index(torch.tensor(chosen), grid.shape), dim=1)
