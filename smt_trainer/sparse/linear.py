"""`SMTLinear` and `SMTConv1D`: linears that train only the chosen blocks."""

from __future__ import annotations

from torch import nn

from smt_trainer.sparse.block_module import BlockModule


class SMTLinear(BlockModule, nn.Linear):  # pyrefly: ignore[inconsistent-inheritance]  # torch forgets `bias=None`
    """An `nn.Linear` with trainable blocks."""


class SMTConv1D(BlockModule):
    """A `Conv1D` of transformers with trainable blocks; its weight is [I, O] and its grid transposed."""
