"""Compute scores from the inputs of the targets; they need no backward.

Let x [T, I] be the inputs of a linear over all T warm-up tokens, padding included, and c a block's columns:

    activation       root of the sum over tokens and columns of x[:, c]^2
    low_activation   1 / activation; 0 if no input reaches the block, which then could not learn

`low_activation` prefers the weights whose updates change the outputs least. Adam moves a weight by about the learning
rate whatever its gradient, so where inputs are large the outputs change a lot, even for texts unlike the task's. The
scale of inputs differs between modules, so use this score with scope="per_module".

In a convolution, each kernel weight multiplies other elements of x as the kernel moves, and each group reads its own
channels. There the sum is over all elements that the weights of a column multiply; for a block with rows of several
groups, the mean over its rows is taken.

An embedding multiplies its rows by ones and zeros. There the sum is how often the tokens of a block row occur, without
the padding token.

All blocks in a block column of a linear get the same score, and so do q, k and v, which share their input. Module order
breaks ties, then row order. Ranks average the sums of squares, which scales all scores alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smt_trainer.model.calls import watching_calls
from smt_trainer.model.convolution import is_convolution, squared_inputs
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import parameter_of
from smt_trainer.scores.scorer import Scorer

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target


class Activation(Scorer):
    """`activation`: L2 norm, over all tokens, of the inputs of the block's columns (SMT's selection by activations)."""

    needs_backward = False
    needs_all_features = True

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        self.sums = {
            name: torch.zeros(_sums_shape(grid), device=parameter_of(targets[name]).device)
            for name, grid in grids.items()
        }

    @contextlib.contextmanager
    def attached(self, by_step: bool = False) -> Generator[None]:
        # Without a graph, no activation is kept and no checkpointed layer runs twice.
        with watching_calls(self.targets, self._add), torch.no_grad():
            yield

    def _add(self, name: str, target: Target, x: Tensor) -> None:
        if is_embedding(target):
            self.sums[name] += _occurrences(target, x).unflatten(0, (-1, self.grids[name].block_rows)).sum(1, True)
            return
        if is_convolution(target):
            squares = squared_inputs(target, x)
        else:
            squares = x.reshape(-1, x.shape[-1]).float().square().sum(0, keepdim=True)
        self.sums[name] += squares.unflatten(1, (self.grids[name].shape[1], -1)).sum(2)

    def statistics(self) -> Iterator[Tensor]:
        yield from self.sums.values()

    def scores(self) -> dict[str, Tensor]:
        return {name: _of_rows(total, self.grids[name]).sqrt().cpu() for name, total in self.sums.items()}


class LowActivation(Activation):
    """`low_activation`: 1 / `activation`, and 0 for blocks that no input reaches."""

    def scores(self) -> dict[str, Tensor]:
        return {name: torch.where(norms > 0, 1 / norms, 0.0) for name, norms in super().scores().items()}


def _sums_shape(grid: BlockGrid) -> tuple[int, int]:
    return (grid.shape[0], 1) if grid.embedding else (grid.groups, grid.shape[1])


def _occurrences(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Return [V] in float32: how often each token occurs, 0 for the padding token."""
    # Estimates run on the meta device, which does not support `bincount`.
    ids = ids.flatten()
    counts = torch.zeros(embedding.num_embeddings, device=ids.device).index_add_(0, ids, torch.ones_like(ids).float())
    if embedding.padding_idx is not None:
        counts[embedding.padding_idx] = 0
    return counts


def _of_rows(sums: Tensor, grid: BlockGrid) -> Tensor:
    """Return [R, C]: the mean over the rows of each block, where each row has its group's sums, of `sums` [g, C]."""
    if grid.embedding:
        return sums.repeat(1, grid.shape[1])
    if grid.groups == 1:
        return sums.repeat(grid.shape[0], 1)
    of_rows = sums.repeat_interleave(grid.out_features // grid.groups, 0)
    return of_rows.unflatten(0, (-1, grid.block_rows)).mean(1)
