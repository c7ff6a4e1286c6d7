"""`SMTConv1d`, `SMTConv2d` and `SMTConv3d`: convolutions that train only the chosen blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from smt_trainer.model.convolution import padded
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.functional.conv import group_channels, sparse_conv

if TYPE_CHECKING:
    from smt_trainer.model.convolution import Convolution


class SMTConv(BlockModule):
    """A convolution with trainable blocks.

    Attributes:
        weight: [O, I/g, *kernel], frozen and dense; its grid cuts it as a matrix.
    """

    group = staticmethod(group_channels)

    def product(self, input: Tensor) -> Tensor:
        x, geometry = padded(self, input)  # pyrefly: ignore[bad-argument-type]  # a subclass is one
        y = sparse_conv(x, self.weight, self.bias, self.blocks, self.positions, self.plan, geometry)
        return y.squeeze(0) if input.ndim < x.ndim else y


class SMTConv1d(SMTConv, nn.Conv1d):  # pyrefly: ignore[inconsistent-inheritance]  # torch forgets `bias=None`
    """An `nn.Conv1d` with trainable blocks."""


class SMTConv2d(SMTConv, nn.Conv2d):  # pyrefly: ignore[inconsistent-inheritance]
    """An `nn.Conv2d` with trainable blocks."""


class SMTConv3d(SMTConv, nn.Conv3d):  # pyrefly: ignore[inconsistent-inheritance]
    """An `nn.Conv3d` with trainable blocks."""


def block_conv_of(conv: Convolution) -> type[SMTConv]:
    """Return the class that a convolution is rewritten to."""
    return (SMTConv1d, SMTConv2d, SMTConv3d)[len(conv.kernel_size) - 1]
