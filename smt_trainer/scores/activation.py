"""`activation`: the score of the inputs, which needs no backward.

Let x [T, I] be the inputs of a linear over all T warm-up tokens, padding included, and c a block's columns:

    activation   root of the sum over tokens and columns of x[:, c]^2

All blocks of a block column get the same score, and so do q, k and v, which share their input. Module order breaks
ties, then row order. Ranks average the sums of squares, which scales all scores alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smt_trainer.scores.scorer import Scorer


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
        handles = []
        try:
            for name, linear in self.targets.items():
                handles.append(linear.register_forward_pre_hook(functools.partial(self._add, name)))
            # Without a graph, no activation is kept and no checkpointed layer runs twice.
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().square().sum(0)
        self.sums[name] += squares.unflatten(0, (len(self.sums[name]), -1)).sum(1)

    def statistics(self) -> Iterator[Tensor]:
        yield from self.sums.values()

    def scores(self) -> dict[str, Tensor]:
        return {name: total.sqrt().cpu().repeat(self.grids[name].shape[0], 1) for name, total in self.sums.items()}
