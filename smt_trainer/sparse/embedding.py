"""Embeddings that train only the chosen blocks, as `linear.py` has linears, and the heads that are tied to them.

A tied head has no blocks of its own. It multiplies by the same weight, and adds its part to the gradient of the
embedding's blocks; so weight and blocks stay one parameter each, which is saved once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.model.embedding import is_scaled, sharing
from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.linear import BlockLinear
from smt_trainer.sparse.sparse_embedding import place_tokens, sparse_embedding
from smt_trainer.sparse.sparse_linear import sparse_linear
from smt_trainer.sparse.write_back import write_back


class SMTEmbedding(BlockLinear, nn.Embedding):  # pyrefly: ignore[inconsistent-inheritance]  # torch types less
    """An embedding with trainable blocks.

    Attributes:
        weight: [V, H], frozen and dense.
        places, within, rows_grid: how backward forms them (`place_tokens`).
        heads: the linears that share the weight.
    """

    bias = None
    places: Tensor
    within: Tensor
    rows_grid: BlockGrid
    heads: list[TiedHead]

    def hold(self, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> Tensor:
        stored = super().hold(grid, block_indices, master_dtype)
        places, within, self.rows_grid = place_tokens(stored, grid, self.padding_idx)
        self.register_buffer("places", places.to(self.weight.device), persistent=False)
        self.register_buffer("within", within.to(self.weight.device), persistent=False)
        self.heads = []
        return stored

    def product(self, input: Tensor) -> Tensor:
        """Return the rows of ids, with a backward that forms only the gradient of rows with chosen blocks."""
        return sparse_embedding(input, self.weight, self.blocks, self.places, self.within, self.rows_grid)

    def tie(self, heads: list[Any]) -> None:
        """Let linears that share the weight train its blocks, too."""
        self.heads = [TiedHead.from_linear(head, self) for head in heads]

    def _restore(self) -> nn.Module:
        for head in self.heads:
            head.to_linear()
        for name in ("places", "within", "rows_grid", "heads"):
            delattr(self, name)
        return super()._restore()

    def extra_repr(self) -> str:
        (br, bc), (rows, columns) = self.grid.block_shape, self.grid.shape
        text = nn.Embedding.extra_repr(self)
        return f"{text}, blocks={len(self.blocks)} of {br}x{bc} (grid {rows}x{columns})"


class TiedHead(nn.Linear):
    """A linear that shares the weight of an embedding with trainable blocks.

    Attributes:
        embedding: whose blocks it trains.
        linear_class: what `to_linear` restores.
    """

    embedding: SMTEmbedding
    linear_class: type[nn.Linear]

    @classmethod
    def from_linear(cls, linear: nn.Linear, embedding: SMTEmbedding) -> TiedHead:
        """Turn a linear into this class in place."""
        linear_class, linear.__class__ = type(linear), cls
        assert isinstance(linear, cls)
        linear.linear_class = linear_class
        # Beside the modules: the head is no parent of the embedding.
        vars(linear)["embedding"] = embedding
        return linear

    def to_linear(self) -> nn.Linear:
        """Turn back into a plain linear, in place."""
        del vars(self)["embedding"]
        self.__class__ = vars(self).pop("linear_class")
        return self

    def forward(self, input: Tensor) -> Tensor:
        embedding = self.embedding
        if not torch.compiler.is_compiling() and embedding.is_stale():
            write_back([embedding])
        return sparse_linear(input, self.weight, self.bias, embedding.blocks, embedding.positions, embedding.plan)


def hold_tokens(
    model: nn.Module, embedding: nn.Embedding, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
) -> SMTEmbedding:
    """Let an embedding of a model train blocks, and the heads that are tied to it."""
    heads = sharing(model, embedding)
    rewritten = _kind_of(type(embedding)).from_linear(embedding, grid, block_indices, master_dtype)
    assert isinstance(rewritten, SMTEmbedding)
    rewritten.tie(heads)
    return rewritten


@functools.cache
def _kind_of(kind: type[nn.Embedding]) -> type[SMTEmbedding]:
    """Return what a class of embeddings is rewritten to; one that scales finds it where its `super()` looks."""
    return type(f"SMT{kind.__name__}", (kind, SMTEmbedding), {}) if is_scaled(kind) else SMTEmbedding
