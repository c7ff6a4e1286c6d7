"""Compute scores from the summed gradient G, held in an accumulator as large as the targets.

    grad_l1      mean over the block of |G|
    grad_l2      root of the sum over the block of G^2

|.| and the square come last, so these scores need the whole signed sum; splitting the data into micro-batches or over
ranks cannot change it. A bfloat16 accumulator takes half the memory but rounds each addition to 8 bits: a contribution
smaller than 1/256 of the sum is lost.

Sums are sharded as FSDP2 shards the gradients, except for experts' matrices: every rank computes their whole gradient
for its own tokens and sums it unsharded, as under DDP.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt_trainer.config import SMTConfig
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.kinds import parameter_of
from smt_trainer.model.sharded import gather_like, is_sharded, local_tensor
from smt_trainer.scores.scorer import Scorer, weight_gradients

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

COPIES_UNDER_WAY = 2


class Accumulated(Scorer):
    """Sums the targets' gradients in `config.accumulator_dtype`, sharded as the targets are."""

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        dtype = getattr(torch, config.accumulator_dtype)
        shapes = {
            name: local_tensor(parameter_of(target)).shape if _is_sharded(target) else grids[name].stored_shape
            for name, target in targets.items()
        }
        devices = {name: parameter_of(target).device for name, target in targets.items()}
        device = _accumulator_device(config, dtype, next(iter(devices.values())), sum(map(math.prod, shapes.values())))
        self.sums = {
            name: torch.zeros(shape, dtype=dtype, device=device or devices[name]) for name, shape in shapes.items()
        }
        self.step_gradients: dict[str, Tensor] = {}
        self.copies = _Copies()

    @contextlib.contextmanager
    def attached(self, by_step: bool = False) -> Generator[None]:
        with weight_gradients(self.targets, self._add_to_step if by_step else self._add):
            yield
        self.copies.finish()

    def _add_to_step(self, name: str, gradient: Tensor) -> None:
        gradient = local_tensor(gradient)
        total = self.step_gradients.get(name)
        self.step_gradients[name] = gradient if total is None else total.add_(gradient)

    def _add(self, name: str, gradient: Tensor) -> None:
        total, gradient = self.sums[name], local_tensor(gradient)
        if gradient.is_cuda and not total.is_cuda:
            self.copies.add(total, gradient)
        else:
            total.add_(gradient.to(total.device))

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        taken = [(self.sums[name], gradient) for name, gradient in self.step_gradients.items()]
        self.step_gradients = {}
        return taken

    def statistics(self) -> Iterator[Tensor]:
        # FSDP2 already averages the gradients of sharded weights.
        yield from (self.sums[name] for name, target in self.targets.items() if not _is_sharded(target))

    def scores(self) -> dict[str, Tensor]:
        found = {}
        for name, target in self.targets.items():
            total = self.sums[name]
            whole = gather_like(total, parameter_of(target)) if _is_sharded(target) else total
            found[name] = self.norms(self.grids[name].split(whole).float()).cpu()
        return found

    @staticmethod
    def norms(blocks: Tensor) -> Tensor:
        """Return the scores [R, C] of summed gradients [R, C, br, bc]."""
        raise NotImplementedError


class GradL1(Accumulated):
    """`grad_l1`: mean over the block of |G| (SMT, section 3.2 and appendix B)."""

    @staticmethod
    def norms(blocks: Tensor) -> Tensor:
        return blocks.abs().mean((2, 3))


class GradL2(Accumulated):
    """`grad_l2`: root of the sum over the block of G^2."""

    @staticmethod
    def norms(blocks: Tensor) -> Tensor:
        return torch.linalg.vector_norm(blocks, dim=(2, 3))


def _is_sharded(target: Target) -> bool:
    return not isinstance(target, ExpertMatrix) and is_sharded(target.weight)


def _accumulator_device(config: SMTConfig, dtype: torch.dtype, device: torch.device, count: int) -> torch.device | None:
    """Return where `count` sums are kept: the CPU, or None for each weight's own device; `device` is the first's."""
    if config.accumulator_device == "auto":
        if device.type != "cuda":
            return None
        return None if dtype.itemsize * count <= torch.cuda.mem_get_info(device)[0] / 2 else torch.device("cpu")
    return torch.device("cpu") if config.accumulator_device == "cpu" else None


class _Copies:
    """Adds gradients on the GPU to sums on the CPU.

    A separate stream copies each gradient into pinned memory. The copy is added to its sum only when later copies are
    under way, so that backward does not wait for it.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.under_way: deque[tuple[Tensor, Tensor, torch.Event]] = deque()

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Start to copy a gradient; add it to its sum later."""
        if gradient.device not in self.streams:
            self.streams[gradient.device] = torch.cuda.Stream(gradient.device)
        stream = self.streams[gradient.device]
        stream.wait_stream(torch.cuda.current_stream(gradient.device))
        copy = torch.empty_like(gradient, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            copy.copy_(gradient, non_blocking=True)
            copied = stream.record_event()
        # Keep backward from reusing the gradient's memory before it is copied.
        gradient.record_stream(stream)
        self.under_way.append((total, copy, copied))
        while len(self.under_way) > COPIES_UNDER_WAY:
            self._add_oldest()

    def finish(self) -> None:
        """Add all gradients that are still under way."""
        while self.under_way:
            self._add_oldest()

    def _add_oldest(self) -> None:
        total, copy, copied = self.under_way.popleft()
        copied.synchronize()
        total.add_(copy)
