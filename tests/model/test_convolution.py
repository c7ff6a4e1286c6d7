"""Convolutions as targets: which are found, how they are cut, and which are refused by name."""

import logging

import images
import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import convolutions
from torch import nn

from smt_trainer import SMTError
from smt_trainer.model.convolution import padded, weight_gradient
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import find_targets, target_grids


class Standardised(nn.Conv2d):
    """Computes something of its own, as BiT's convolutions do."""

    def forward(self, input):
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


class Other(nn.Conv2d):
    """Is called as usual and convolves otherwise."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(2 * input, weight, bias)


def grid_of(conv: nn.Module, **fields) -> BlockGrid:
    return target_grids({"conv": conv}, images.config(**fields))["conv"]


def test_all_conv_finds_the_convolutions_and_all_linear_the_linears():
    model = images.ResNeXt()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(find_targets(model, images.config())) == convolutions
    assert list(find_targets(model, images.config(target_modules="all-linear"))) == ["head"]
    assert list(find_targets(model, images.config(target_modules=["conv2", "head"]))) == [
        "blocks.0.conv2",
        "blocks.1.conv2",
        "head",
    ]
    assert list(find_targets(model, images.config(target_modules=r"blocks\.1\.conv\d", exclude_modules=["conv2"]))) == [
        "blocks.1.conv1",
        "blocks.1.conv3",
    ]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "it is a ConvTranspose2d, and the rows of its weight compute no output channel"),
        (Standardised(4, 4, 3), "its class, Standardised, has a forward of its own"),
        (Other(4, 4, 3), "its class, Other, has a forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "its weight is not a plain matrix of floats"),
    ],
)
def test_what_cannot_be_tuned_is_left_out_by_name(layer, reason, caplog):
    model = nn.ModuleDict({"plain": nn.Conv2d(4, 4, 3), "odd": layer})
    with caplog.at_level(logging.WARNING):
        for target_modules in ("all-conv", ["plain", "odd"]):
            assert list(find_targets(model, images.config(target_modules=target_modules))) == ["plain"]
    assert caplog.text.count(f"`odd` is not tuned: {reason}") == 2


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_row_computes_an_output_channel_and_a_column_reads_an_input_channel(kind, groups):
    conv, dimensions = kind(4, 8, 3, groups=groups), kind.__name__[4]
    place = tuple([1] * int(dimensions[0]))
    rows, columns = grid_of(conv), grid_of(conv, granularity="column")
    assert rows.shape == (8, 1) and rows.stored_shape == conv.weight.shape
    assert columns.num_blocks == 4 and columns.shape == (groups, 4 // groups)
    for row in range(8):
        assert torch.equal(rows.split(conv.weight)[row, 0, 0], conv.weight[row].flatten())
    for channel in range(4):
        # Where only this channel is read, the other weights do not matter.
        x = torch.zeros(4, *[3] * int(dimensions[0]))
        x[channel] = torch.randn(x.shape[1:])
        index = np.unravel_index(channel, columns.shape)
        only = torch.zeros_like(conv.weight)
        columns.split(only)[index] = columns.split(conv.weight.detach())[index]
        y, kept = conv(x), conv.weight.data
        conv.weight.data = only
        assert torch.equal(conv(x), y)
        conv.weight.data = kept
    assert columns.split(conv.weight)[0, 0].shape == (8 // groups, 3 ** len(place))


def test_a_grid_of_a_convolution_survives_json_and_refuses_what_is_none():
    grid = grid_of(nn.Conv2d(4, 8, (3, 2), groups=2))
    assert BlockGrid.from_dict(grid.to_dict()) == grid
    for wrong in ({"kernel": [3, 5]}, {"groups": 3}, {"kernel": [-3, -2]}, {"kernel": "32"}, {"groups": True}):
        with pytest.raises(SMTError):
            BlockGrid.from_dict(grid.to_dict() | wrong)
    with pytest.raises(SMTError, match="cannot belong to a convolution"):
        BlockGrid(8, 12, 1, 12, groups=2)


def test_blocks_must_divide_the_matrix():
    with pytest.raises(SMTError, match=r"`conv` is 8x18; block_size=\(4, 4\) does not divide it"):
        grid_of(nn.Conv2d(2, 8, 3), granularity="block", block_size=(4, 4))


def test_a_weight_with_channels_last_is_read_and_written():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    grid, plain = grid_of(conv), conv.weight.detach().contiguous()
    index = torch.tensor([[3, 0], [5, 0]])
    blocks = torch.randn(2, 1, 36)
    assert torch.equal(grid.gather(conv.weight, index), grid.gather(plain, index))
    grid.scatter_(conv.weight.data, index, blocks)
    grid.scatter_(plain, index, blocks)
    assert torch.equal(conv.weight, plain) and not conv.weight.is_contiguous()


@given(convolutions())
def test_padding_and_gradient_are_those_of_the_convolution(drawn):
    conv, x = drawn
    y = conv(x)
    batch, geometry = padded(conv, x)
    assert torch.equal(geometry.product(batch, conv.weight, conv.bias).view(y.shape), y)
    dy = torch.randn_like(y)
    y.backward(dy)
    dw = weight_gradient(conv, x, dy.view(-1, *dy.shape[-len(conv.kernel_size) - 1 :]))
    torch.testing.assert_close(dw, conv.weight.grad)
