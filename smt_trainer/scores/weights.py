"""Compute scores that need no warm-up: from the base weights alone, or at random."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_trainer.model.quantised import dense_weight
from smt_trainer.scores.scorer import Scorer


class Magnitude(Scorer):
    """`magnitude`: L2 norm of the block in the base weight (SPSFT, section 3.2)."""

    needs_warmup = False

    def scores(self) -> dict[str, Tensor]:
        return {
            name: torch.linalg.vector_norm(self.grids[name].split(dense_weight(linear)).float(), dim=(2, 3)).cpu()
            for name, linear in self.targets.items()
        }


class Random(Scorer):
    """`random`: uniform in (0, 1], from the run's seed."""

    needs_warmup = False

    def scores(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: 1.0 - torch.rand(grid.shape, generator=generator) for name, grid in self.grids.items()}
