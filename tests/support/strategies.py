"""Hypothesis strategies for grids and blocks."""

import math

import torch
from hypothesis import strategies as st
from torch import nn

from smt_trainer.model.grid import BlockGrid


@st.composite
def grids(draw) -> BlockGrid:
    """Draw a grid of up to 5x5 blocks of up to 4x4, of a weight that may be stored transposed."""
    (rows, columns), (br, bc) = (draw(st.tuples(*[st.integers(1, most)] * 2)) for most in (5, 4))
    return BlockGrid(rows * br, columns * bc, br, bc, transposed=draw(st.booleans()))


@st.composite
def convolution_grids(draw) -> BlockGrid:
    """Draw a grid of up to 3x3 blocks, of the weight of a convolution."""
    kernel = draw(st.sampled_from([(2,), (1, 3), (2, 2)]))
    rows, columns, br, bc = (draw(st.integers(1, most)) for most in (3, 3, 2, 2))
    weights = math.prod(kernel)
    return BlockGrid(rows * br, columns * bc * weights, br, bc * weights, kernel=kernel)


@st.composite
def some_blocks(draw, of: st.SearchStrategy[BlockGrid] | None = None) -> tuple[BlockGrid, torch.Tensor]:
    """Draw a grid, by default of a matrix, and some of its blocks, in any order."""
    grid = draw(of or grids())
    chosen = draw(st.lists(st.integers(0, grid.num_blocks - 1), min_size=1, unique=True))
    return grid, torch.stack(torch.unravel_index(torch.tensor(chosen), grid.shape), dim=1)


@st.composite
def convolutions(draw) -> tuple[nn.Module, torch.Tensor]:
    """Draw a convolution in double precision, and an input of one image or several that is large enough for it."""
    space = draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 3)] * space)
    kernel, stride, dilation = draw(sizes), draw(sizes), draw(sizes)
    groups = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["valid", "same", None]))
    if padding is None:
        padding = draw(st.tuples(*[st.integers(0, 2)] * space))
    mode = draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][space - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    least = [max(d * (k - 1) + 2, 3) for d, k in zip(dilation, kernel, strict=True)]
    x = torch.randn(draw(st.integers(1, 2)), conv.in_channels, *least, dtype=torch.float64)
    return conv, x[0] if draw(st.booleans()) else x
