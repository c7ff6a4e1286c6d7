"""`SMTEmbedding`: an embedding that trains only the chosen blocks, and the heads that are tied to it.

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
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.functional.embedding import place_tokens, sparse_embedding
from smt_trainer.sparse.functional.linear import sparse_linear
from smt_trainer.sparse.write_back import write_back


class SMTEmbedding(BlockModule, nn.Embedding):  # pyrefly: ignore[inconsistent-inheritance]  # torch types less
    """An embedding with trainable blocks.

    Attributes:
        weight: [V, H], frozen and dense.
        places, within, rows_grid: how backward forms the blocks' gradient (`place_tokens`).
        heads: the linears that share the weight.
    """

    INDICES = (*BlockModule.INDICES, "places", "within")
    bias = None
    places: Tensor
    within: Tensor
    rows_grid: BlockGrid
    heads: list[TiedHead]

    def take_blocks(self, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype) -> Tensor:
        stored = super().take_blocks(grid, block_indices, master_dtype)
        places, within, self.rows_grid = place_tokens(stored, grid, self.padding_idx)
        self.register_buffer("places", places.to(self.weight.device), persistent=False)
        self.register_buffer("within", within.to(self.weight.device), persistent=False)
        self.heads = []
        return stored

    def product(self, input: Tensor) -> Tensor:
        """Look up token ids, with a backward that forms only the gradient of rows with chosen blocks."""
        return sparse_embedding(input, self.weight, self.blocks, self.places, self.within, self.rows_grid)

    def tie(self, heads: list[Any]) -> None:
        """Make the linears that share the weight contribute to the gradient of its blocks."""
        self.heads = [TiedHead.from_plain(head, self) for head in heads]

    def _restore(self) -> nn.Module:
        for head in self.heads:
            head.to_plain()
        for name in ("places", "within", "rows_grid", "heads"):
            delattr(self, name)
        return super()._restore()


class TiedHead(nn.Linear):
    """A linear that shares the weight of an embedding with trainable blocks.

    Attributes:
        embedding: the embedding whose blocks it trains.
        plain_class: the class that `to_plain` restores.
    """

    embedding: SMTEmbedding
    plain_class: type[nn.Linear]

    @classmethod
    def from_plain(cls, linear: nn.Linear, embedding: SMTEmbedding) -> TiedHead:
        """Turn a linear into this class in place."""
        plain_class, linear.__class__ = type(linear), cls
        assert isinstance(linear, cls)
        linear.plain_class = plain_class
        # Not registered as a submodule: the head is no parent of the embedding.
        vars(linear)["embedding"] = embedding
        return linear

    def to_plain(self) -> nn.Linear:
        """Turn back into a plain linear, in place."""
        del vars(self)["embedding"]
        self.__class__ = vars(self).pop("plain_class")
        return self

    def forward(self, input: Tensor) -> Tensor:
        embedding = self.embedding
        if not torch.compiler.is_compiling() and embedding.is_stale():
            write_back([embedding])
        return sparse_linear(input, self.weight, self.bias, embedding.blocks, embedding.positions, embedding.plan)


def convert_embedding(
    model: nn.Module, embedding: nn.Embedding, grid: BlockGrid, block_indices: Tensor, master_dtype: torch.dtype
) -> SMTEmbedding:
    """Rewrite an embedding of a model, and the heads that are tied to it, so that they train its blocks."""
    heads = sharing(model, embedding)
    rewritten = _kind_of(type(embedding)).from_plain(embedding, grid, block_indices, master_dtype)
    assert isinstance(rewritten, SMTEmbedding)
    rewritten.tie(heads)
    return rewritten


@functools.cache
def _kind_of(kind: type[nn.Embedding]) -> type[SMTEmbedding]:
    """Return the class that embeddings are rewritten to. A class that scales comes first in it: its forward calls
    `super().forward`, which is then that of `SMTEmbedding`."""
    return type(f"SMT{kind.__name__}", (kind, SMTEmbedding), {}) if is_scaled(kind) else SMTEmbedding
