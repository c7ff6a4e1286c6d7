"""Linears with trainable blocks over a weight that bitsandbytes has quantised.

With Q(W) [O, I] the values of the quantised weight, and P the chosen blocks' places,

    W' = Q(W) outside of P, the blocks in P
    y  = x W'^T + bias
    dx = dy W'

and the gradient of the blocks is that of `sparse_linear.py`. W' is made for each product and dropped, as bitsandbytes
makes Q(W): putting the blocks in copies no more than the blocks. So a layer is bit for bit the dense one of its
dequantised weight with the blocks in it, before training that of bitsandbytes in 4 bits, and after it the merged one.
In 8 bits bitsandbytes also quantises its inputs to 8 bits, and multiplies integers; a linear with blocks does not.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from smt_trainer.model.quantised import bits_of, compute_dtype, dequantised, make_plain
from smt_trainer.sparse.linear import BlockLinear
from smt_trainer.sparse.sparse_linear import sparse_linear


class QuantisedBlockLinear(BlockLinear):
    """A quantised linear with trainable blocks.

    Attributes:
        weight: as bitsandbytes holds it, and as it stays.
        dense_dtype: the dtype of W'.
    """

    is_written = False
    dense_dtype: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dense_dtype

    def base_weight(self) -> Tensor:
        return dequantised(self, self.dense_dtype)

    def merged_weight(self) -> Tensor:
        weight = self.base_weight()
        self.grid.scatter_(weight, self.block_indices, self.blocks.detach())
        return weight

    # It calls what torch.compile cannot look into.
    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        dtype = compute_dtype(self, input)
        bias = None if self.bias is None else self.bias.to(dtype)

        def read_weight() -> Tensor:
            return self.merged_weight().to(dtype)

        with torch.autocast(input.device.type, enabled=False):
            x = input.to(dtype)
            y = sparse_linear(x, self.weight, bias, self.blocks, self.positions, self.plan, read_weight)
        return y.to(input.dtype)

    def is_stale(self) -> bool:
        return False

    def to_linear(self) -> nn.Module:
        """Turn into a plain, dense linear with the weight W', in place."""
        weight = self.merged_weight()
        return make_plain(self._restore(), weight)


class SMTLinear4bit(QuantisedBlockLinear, bnb.nn.Linear4bit):
    """A `Linear4bit` of bitsandbytes with trainable blocks."""


class SMTLinear8bit(QuantisedBlockLinear, bnb.nn.Linear8bitLt):
    """A `Linear8bitLt` of bitsandbytes with trainable blocks."""


def block_linear_of(linear: nn.Module) -> type[QuantisedBlockLinear]:
    """Return what a quantised linear is rewritten to."""
    return SMTLinear4bit if bits_of(linear) == 4 else SMTLinear8bit
