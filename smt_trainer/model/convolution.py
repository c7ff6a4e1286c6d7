"""Treat convolutions as matrices: their rows, columns, products and gradients.

A convolution of g groups has a weight W [O, I/g, *kernel]. Group j reads the input channels from j I/g on and computes
the output channels from j O/g on. At the output position p, for the output channel o of group j,

    y[o, p] = bias[o] + sum over c, k of W[o, c, k] x[j I/g + c, stride p - padding + dilation k]

Its grid cuts W as a matrix [O, K] with K = I/g * k, where k is the number of weights in a kernel. A row computes one
output channel (SPSFT's neuron). With granularity="column", a block is all weights that read one input channel: the
O/g x k weights of one c in one group. A transposed convolution stores W [I, O/g, *kernel]. Its rows do not compute one
output channel each, so it is not a target.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from smt_trainer.model.grid import BlockGrid

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_convolution(module: object) -> TypeIs[Convolution]:
    """Return whether a module is a convolution that is not transposed."""
    return isinstance(module, PLAIN)


def is_transposed_convolution(module: nn.Module) -> TypeIs[_ConvTransposeNd]:
    """Return whether a module is a transposed convolution."""
    return isinstance(module, _ConvTransposeNd)


def has_plain_forward(conv: Convolution) -> bool:
    """Return whether a convolution's class has the forward of torch's own class."""
    return any((type(conv).forward, type(conv)._conv_forward) == (k.forward, k._conv_forward) for k in PLAIN)


def matrix_shape(conv: Convolution) -> tuple[int, int]:
    """Return (O, K)."""
    return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)


def as_convolution(grid: BlockGrid, conv: Convolution, granularity: str) -> BlockGrid:
    """Turn a grid over [O, K] into a convolution's grid; for columns, make each block one input channel."""
    grid = replace(grid, kernel=tuple(conv.kernel_size), groups=conv.groups)
    if granularity != "column":
        return grid
    rows, columns = grid.column_shape
    return replace(grid, block_rows=rows, block_columns=columns)


class Geometry(NamedTuple):
    """How a convolution moves over a padded input; each tuple has one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve x [N, I, *space] with W [O, I/g, *kernel]; return y [N, O, *space]."""
        return PRODUCTS[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return dx in the shape of x; the values of x do not matter."""
        return self._backward(dy, x, weight, [True, False, False])[0]

    def weight_gradient(self, dy: Tensor, x: Tensor, channels: int, kernel: tuple[int, ...]) -> Tensor:
        """Return dW [O, channels, *kernel] for `channels` input channels per group, in dy's dtype."""
        shape = dy.new_empty(dy.shape[1], channels, *kernel)
        return self._backward(dy, x.to(dy.dtype), shape, [False, True, False])[1]

    def _backward(self, dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        unused = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False, unused, self.groups, wanted
        )


def padded(conv: Convolution, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return an input [N, I, *space] or [I, *space] as a batch, and how the convolution moves over it. Padding
    beyond the same number of zeros on both sides is already applied to the batch."""
    if x.ndim == len(conv.kernel_size) + 1:
        x = x.unsqueeze(0)
    sides = _sides(conv)
    padding = tuple(left for left, _ in sides)
    if conv.padding_mode != "zeros":
        x = F.pad(x, [width for side in reversed(sides) for width in side], conv.padding_mode)
        padding = (0,) * len(sides)
    elif any(left != right for left, right in sides):
        x = F.pad(x, [width for left, right in reversed(sides) for width in (0, right - left)])
    return x, Geometry(tuple(conv.stride), padding, tuple(conv.dilation), conv.groups)


def weight_gradient(conv: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """Return dW [O, I/g, *kernel] of a batch x [N, I, *space] with the gradient dy [N, O, *space] of its output."""
    x, geometry = padded(conv, x)
    return geometry.weight_gradient(dy, x, conv.in_channels // conv.groups, tuple(conv.kernel_size))


def squared_inputs(conv: Convolution, x: Tensor) -> Tensor:
    """Return [g, K] in float32: for each group and column of W, the sum of x^2 over all elements of x [N, I, *space]
    that the column's weights multiply. It is the weight gradient of a depthwise convolution of x^2 for dy = 1."""
    x, geometry = padded(conv, x.detach())
    squares = x.float().square().sum(0, keepdim=True)
    geometry, kernel = geometry._replace(groups=conv.in_channels), tuple(conv.kernel_size)
    space = geometry.product(squares, squares.new_empty(conv.in_channels, 1, *kernel), None).shape[2:]
    ones = squares.new_ones(1, conv.in_channels, *space)
    return geometry.weight_gradient(ones, squares, 1, kernel).view(conv.groups, -1)


def _sides(conv: Convolution) -> list[tuple[int, int]]:
    """Return the width of the padding before and after each spatial dimension."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        # If the width is odd, torch puts the larger half after.
        widths = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(width // 2, width - width // 2) for width in widths]
    return [(int(width), int(width)) for width in conv.padding]
