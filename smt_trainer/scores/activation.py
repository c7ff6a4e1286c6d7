"""`activation`: the score of the inputs, which needs no backward.

Let x [T, I] be the inputs of a linear over all T warm-up tokens, padding included, and c a block's columns:

    activation   root of the sum over tokens and columns of x[:, c]^2

All blocks of a block column get the same score, and so do q, k and v, which share their input. Module order breaks
ties, then row order. Ranks average the sums of squares, which scales all scores alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt_trainer.model.calls import watching_calls
from smt_trainer.scores.scorer import Scorer

if TYPE_CHECKING:
    from smt_trainer.model.targets import Target


class Activation(Scorer):
    """`activation`: L2 norm, over all tokens, of the inputs of the block's columns (SMT's selection by activations)."""

    needs_backward = False

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        self.sums = {
            name: torch.zeros(grids[name].shape[1], device=linear.weight.device) for name, linear in targets.items()
        }

    @contextlib.contextmanager
    def attached(self, hold: bool = False) -> Iterator[None]:
        # Without a graph, no activation is kept and no checkpointed layer runs twice.
        with watching_calls(self.targets, self._add), torch.no_grad():
            yield

    def _add(self, name: str, target: Target, x: Tensor) -> None:
        squares = x.reshape(-1, x.shape[-1]).float().square().sum(0)
        self.sums[name] += squares.unflatten(0, (len(self.sums[name]), -1)).sum(1)

    def statistics(self) -> Iterator[Tensor]:
        yield from self.sums.values()

    def scores(self) -> dict[str, Tensor]:
        return {name: total.sqrt().cpu().repeat(self.grids[name].shape[0], 1) for name, total in self.sums.items()}
