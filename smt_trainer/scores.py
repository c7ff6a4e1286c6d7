"""Scores: how much each block of the targeted weights matters for the task.

G = sum over warm-up steps t of G_t is the summed gradient of one weight W [O, I], where G_t is the gradient of the loss
of one optimizer step (all micro-batches and ranks together) at the base weights.

    grad_l1      mean over the block of |G|      SMT, section 3.2 and appendix B
    grad_signed  |mean over the block of G|      what the authors' released code ranks by
    magnitude    L2 norm of the block of W       SPSFT, section 3.2 (no warm-up)
    random       uniform, seeded                 the baseline a score has to beat (no warm-up)

The mean over a block is linear, and G_t = dy^T x (dy [T, O], x [T, I], T tokens), so that with p(.) the mean over
the br or bc neighbouring features of one block row or column

    mean over block (r, c) of G_t = sum over tokens of p(dy)[:, r] * p(x)[:, c]

and `grad_signed` needs no weight gradient at all: one product of pooled activations, one number per block.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from smt_trainer.blocks import BlockGrid
from smt_trainer.config import SMTConfig
from smt_trainer.sharding import full_tensor, gather_like, is_sharded, local_tensor


class Scorer(ABC):
    """Scores the blocks of the targets, if need be from what it sees of forward and backward while `attached`.

    Args:
        targets: module name -> linear, in the model's order.
        grids: module name -> grid.
        config: the configuration; a scorer reads its own fields only.
        seed: for scores that draw.
    """

    needs_warmup: ClassVar[bool]

    def __init__(
        self, targets: Mapping[str, nn.Module], grids: Mapping[str, BlockGrid], config: SMTConfig, seed: int
    ) -> None:
        self.targets, self.grids, self.config, self.seed = targets, grids, config, seed

    @contextlib.contextmanager
    def attached(self, hold: bool = False) -> Iterator[None]:
        """Observe the targets within this context; all hooks are gone after it, also after an exception.

        With `hold`, what an optimizer step contributes is kept apart until the caller takes it by `take_step`.
        """
        yield

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        """Each sum and what the step that was just run contributes to it; the scorer forgets the latter."""
        return []

    def statistics(self) -> Iterator[Tensor]:
        """What was summed so far, one tensor at a time: linear in the data, so ranks may average it in place."""
        yield from ()

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Module name -> scores [R, C], float32 on the CPU, in the model's order."""


class GradL1(Scorer):
    """`grad_l1`: mean over the block of |G|. Keeps a float32 accumulator like the targets, sharded as they are."""

    needs_warmup = True

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        device = _accumulator_device(targets, config)
        self.sums = {
            name: torch.zeros_like(local_tensor(linear.weight), dtype=torch.float32, device=device)
            for name, linear in targets.items()
        }

    @contextlib.contextmanager
    def attached(self, hold: bool = False) -> Iterator[None]:
        handles = []
        try:
            for name, linear in self.targets.items():
                linear.weight.requires_grad_(True)
                linear.weight.grad = None
                if not hold:
                    handles.append(linear.weight.register_post_accumulate_grad_hook(_drain_into(self.sums[name])))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for linear in self.targets.values():
                linear.weight.requires_grad_(False)
                linear.weight.grad = None

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        taken = []
        for name, linear in self.targets.items():
            if linear.weight.grad is not None:
                taken.append((self.sums[name], local_tensor(linear.weight.grad)))
                linear.weight.grad = None
        return taken

    def statistics(self) -> Iterator[Tensor]:
        # FSDP2 averages the gradients of sharded weights itself.
        yield from (self.sums[name] for name, linear in self.targets.items() if not is_sharded(linear.weight))

    def scores(self) -> dict[str, Tensor]:
        return {
            name: self.grids[name].split(gather_like(self.sums[name], linear.weight)).abs().mean((2, 3)).cpu()
            for name, linear in self.targets.items()
        }


def _drain_into(total: Tensor):
    """A hook that adds a weight's gradient to `total` and frees it: one gradient is alive at a time."""

    def drain(weight: Tensor) -> None:
        total.add_(local_tensor(weight.grad).to(total.device))
        weight.grad = None

    return drain


def _accumulator_device(targets: Mapping[str, nn.Module], config: SMTConfig) -> torch.device | None:
    """The CPU, or None for the device of each weight."""
    if config.accumulator_device == "auto":
        device = next(iter(targets.values())).weight.device
        if device.type != "cuda":
            return None
        needed = 4 * sum(linear.weight.numel() for linear in targets.values())
        return None if needed <= torch.cuda.mem_get_info(device)[0] / 2 else torch.device("cpu")
    return torch.device("cpu") if config.accumulator_device == "cpu" else None


class GradSigned(Scorer):
    """`grad_signed`: |mean over the block of G|. Keeps one number per block and forms no weight gradient."""

    needs_warmup = True

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        self.sums = {
            name: torch.zeros(grids[name].shape, device=linear.weight.device) for name, linear in targets.items()
        }

    @contextlib.contextmanager
    def attached(self, hold: bool = False) -> Iterator[None]:
        handles = []
        self.step_sums = {name: torch.zeros_like(total) for name, total in self.sums.items()} if hold else self.sums
        try:
            for name, linear in self.targets.items():
                handles.append(linear.register_forward_hook(self._observe(self.grids[name], self.step_sums[name])))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        taken = []
        for name, contribution in self.step_sums.items():
            taken.append((self.sums[name], contribution.clone()))
            contribution.zero_()
        return taken

    @staticmethod
    def _observe(grid: BlockGrid, total: Tensor):
        rows, columns = grid.shape

        def observe(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # With all weights frozen nothing asks for a gradient at the lowest target; a leaf in its place does.
            started = output if output.requires_grad else output.detach().requires_grad_(True)
            pooled_x = _pool(inputs[0], columns)

            def add(dy: Tensor) -> None:
                total.addmm_(_pool(dy, rows).t(), pooled_x)

            started.register_hook(add)
            return started

        return observe

    def statistics(self) -> Iterator[Tensor]:
        yield from self.sums.values()

    def scores(self) -> dict[str, Tensor]:
        return {name: total.abs().cpu() for name, total in self.sums.items()}


def _pool(features: Tensor, parts: int) -> Tensor:
    """Means [T, parts] over equal runs of the last dimension of `features` [..., parts * edge], in float32."""
    return features.detach().reshape(-1, parts, features.shape[-1] // parts).mean(2, dtype=torch.float32)


class Magnitude(Scorer):
    """`magnitude`: L2 norm of the block of the base weight (SPSFT, section 3.2)."""

    needs_warmup = False

    def scores(self) -> dict[str, Tensor]:
        return {
            name: torch.linalg.vector_norm(self.grids[name].split(full_tensor(linear.weight)).float(), dim=(2, 3)).cpu()
            for name, linear in self.targets.items()
        }


class Random(Scorer):
    """`random`: uniform in (0, 1], from the run's seed."""

    needs_warmup = False

    def scores(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: 1.0 - torch.rand(grid.shape, generator=generator) for name, grid in self.grids.items()}


SCORERS: dict[str, type[Scorer]] = {
    "grad_l1": GradL1,
    "grad_signed": GradSigned,
    "magnitude": Magnitude,
    "random": Random,
}


def make_scorer(
    targets: Mapping[str, nn.Module], grids: Mapping[str, BlockGrid], config: SMTConfig, seed: int = 0
) -> Scorer:
    """The scorer that `config.score` names."""
    return SCORERS[config.score](targets, grids, config, seed)
