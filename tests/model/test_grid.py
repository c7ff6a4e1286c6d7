"""`BlockGrid` and the choice of block sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from reference import block, block_mask
from strategies import grids, some_blocks

from smt_trainer import SMTConfig, SMTError
from smt_trainer.model.grid import BlockGrid, make_grids

SHAPES = {"q_proj": (192, 64), "up_proj": (96, 64)}


@given(grids())
def test_split_shows_each_block_as_a_view(grid):
    weight = torch.arange(grid.out_features * grid.in_features).view(grid.stored_shape)
    split = grid.split(weight)
    assert split.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert split.shape == (*grid.shape, *grid.block_shape)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            assert torch.equal(split[row, column], block(weight, grid, row, column))


@given(some_blocks())
def test_gather_reads_the_blocks_in_the_order_asked_for(case):
    grid, block_indices = case
    weight = torch.randn(grid.stored_shape)
    expected = torch.stack([block(weight, grid, row, column) for row, column in block_indices.tolist()])
    assert torch.equal(grid.gather(weight, block_indices), expected)


@given(some_blocks())
def test_scatter_is_the_inverse_of_gather_and_touches_nothing_else(case):
    grid, block_indices = case
    weight, blocks = torch.randn(grid.stored_shape), torch.randn(len(block_indices), *grid.block_shape)
    written = weight.clone()
    grid.scatter_(written, block_indices, blocks)
    outside = ~block_mask(grid, block_indices)
    assert torch.equal(grid.gather(written, block_indices), blocks)
    assert torch.equal(written[outside], weight[outside])


@pytest.mark.parametrize("shape", [(64, 64, 48, 16), (64, 64, 16, 0), (64, 64, -16, 16), (64, 64, 128, 16)])
def test_a_block_that_does_not_divide_the_weight_is_refused(shape):
    with pytest.raises(SMTError, match="does not divide a weight of 64x64"):
        BlockGrid(*shape)


@pytest.mark.parametrize(
    ("block_indices", "message"),
    [
        ([[0, 4]], r"2x4 blocks, but block \(0, 4\)"),
        ([[0, 0], [-1, 0]], r"block \(-1, 0\)"),
        ([[1, 1], [0, 2], [1, 1]], "name a block twice"),
        ([[0.0, 1.0]], r"must be integers of shape \[n, 2\]"),
        ([0, 1], r"must be integers of shape \[n, 2\]"),
        ([[0, 1, 2]], r"must be integers of shape \[n, 2\]"),
    ],
)
def test_damaged_block_indices_are_refused_naming_the_module(block_indices, message):
    with pytest.raises(SMTError, match=f"(?s)`layers.0.q_proj`.*{message}|{message}.*`layers.0.q_proj`"):
        BlockGrid(32, 64, 16, 16).check_indices(np.array(block_indices), "layers.0.q_proj")


@pytest.mark.parametrize(
    ("fields", "block_shapes"),
    [
        ({"block_size": "auto"}, [(32, 32), (32, 32)]),
        ({"block_size": 16}, [(16, 16), (16, 16)]),
        ({"block_size": (96, 16)}, [(96, 16), (96, 16)]),
        ({"granularity": "row"}, [(1, 64), (1, 64)]),
        ({"granularity": "column"}, [(192, 1), (96, 1)]),
    ],
)
def test_grids_have_the_configured_shape(fields, block_shapes):
    assert [grid.block_shape for grid in make_grids(SHAPES, SMTConfig(**fields)).values()] == block_shapes


@pytest.mark.parametrize(
    ("dimensions", "edge"), [((4096, 4096), 256), ((576, 192), 192), ((896, 128), 128), ((512, 768), 256)]
)
def test_auto_is_the_largest_common_divisor_up_to_256(dimensions, edge):
    assert make_grids({"q_proj": dimensions}, SMTConfig())["q_proj"].block_shape == (edge, edge)


def test_auto_below_16_is_refused_naming_the_odd_modules():
    shapes = {"q_proj": (64, 64), "odd_proj": (56, 64)}
    with pytest.raises(SMTError, match=r"found 8 as the largest common divisor.*`odd_proj` \(56x64\)"):
        make_grids(shapes, SMTConfig())


def test_a_block_size_that_does_not_divide_is_refused_naming_one_that_does():
    with pytest.raises(SMTError, match=r"`up_proj` is 96x64; block_size=64 does not divide it.*'auto' \(32 here\)"):
        make_grids(SHAPES, SMTConfig(block_size=64))
