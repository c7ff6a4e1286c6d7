"""Linears with trainable blocks over a weight that bitsandbytes has quantised.

With Q(W) [O, I] the values of the quantised weight, and P the chosen blocks' places,

    W' = Q(W) outside of P, the blocks in P
    y  = x W'^T + bias
    dx = dy W'

and the gradient of the blocks is that of `functional/linear.py`. W' is built for each product and then dropped, as
bitsandbytes does with Q(W); inserting the blocks copies only the blocks. So a layer computes bit for bit what a dense
linear with the weight W' does: before training, that is the output of bitsandbytes in 4 bits, and afterwards that of
the merged model. In 8 bits, bitsandbytes also quantises the inputs to 8 bits and multiplies integers; a linear with
blocks does not.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from smt_trainer.model.quantised import bits_of, compute_dtype, dequantised, make_plain
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.functional.linear import sparse_linear


class QuantisedBlockLinear(BlockModule):
    """A quantised linear with trainable blocks.

    Attributes:
        weight: as bitsandbytes stores it; training does not change it.
        dense_dtype: the dtype of W'.
    """

    weight_holds_blocks = False
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

    # It calls bitsandbytes, which torch.compile cannot trace.
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

    def to_plain(self) -> nn.Module:
        """Turn into a plain, dense linear with the weight W', in place."""
        weight = self.merged_weight()
        return make_plain(self._restore(), weight)


class SMTLinear4bit(QuantisedBlockLinear, bnb.nn.Linear4bit):
    """A `Linear4bit` of bitsandbytes with trainable blocks."""


class SMTLinear8bit(QuantisedBlockLinear, bnb.nn.Linear8bitLt):
    """A `Linear8bitLt` of bitsandbytes with trainable blocks."""


def block_linear_of(linear: nn.Module) -> type[QuantisedBlockLinear]:
    """Return the class that a quantised linear is rewritten to."""
    return SMTLinear4bit if bits_of(linear) == 4 else SMTLinear8bit
