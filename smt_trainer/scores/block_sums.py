"""Compute scores from one number per block, summed in float32.

    grad_signed  |mean over the block of G|
    grad_abs     sum over t of the mean over the block of |G_t|
    taylor       |<W, G>|, the sum over the block of W * G

The mean over a block is linear, and G_t = dy^T x (dy [T, O], x [T, I], T tokens). With p(.) the mean over the br or bc
neighbouring features of one block row or column,

    mean over block (r, c) of G_t = sum over tokens of p(dy)[:, r] * p(x)[:, c]

so `grad_signed` needs no weight gradient, only one product of pooled activations. It does compute the weight gradient
of convolutions, whose weights multiply many positions, and of embeddings, to which a tied head may add. The other two
scores compute one weight gradient at a time, reduce it to one number per block and drop it. Since <W, G> = sum over t
of <W, G_t>, `taylor` needs no sum of gradients either.

Where FSDP2 or tensor parallelism shards a weight over n ranks, each rank reduces its own part and multiplies the result
by n. All sums are averaged over ranks, which then gives the sum over the whole block. Under tensor parallelism
`grad_signed` computes the weight gradient, too, since a rank sees only some of the features. Under FSDP2, each rank has
the whole gradient of an expert's matrix for its own tokens, as under DDP.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import parameter_of
from smt_trainer.model.quantised import dense_weight, is_quantised
from smt_trainer.model.sharded import is_dtensor, local_parts, local_tensor
from smt_trainer.model.tensor_parallel import is_tensor_parallel
from smt_trainer.scores.scorer import Scorer, output_gradients, weight_gradients

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target


class BlockSums(Scorer):
    """Keeps one sum per block; its absolute value is the score.

    Attributes:
        reads_weights: whether `terms` uses the values of the weight.
    """

    reads_weights: ClassVar[bool] = False

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        self.sums = {
            name: torch.zeros(grids[name].shape, device=parameter_of(target).device) for name, target in targets.items()
        }

    @contextlib.contextmanager
    def attached(self, by_step: bool = False) -> Generator[None]:
        self.step_sums = {name: torch.zeros_like(total) for name, total in self.sums.items()} if by_step else self.sums
        with self.observing():
            yield

    def observing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each backward adds to `step_sums`."""
        raise NotImplementedError

    def reduce(self, name: str, gradient: Tensor, terms: Callable[[BlockGrid, Tensor, Tensor], Tensor]) -> None:
        """Add the block sums of `terms(grid, weight, gradient)` [rows, columns] for this rank's part of the weight."""
        target, grid, gradient = self.targets[name], self.grids[name], local_tensor(gradient).flatten(1)
        weight = target.weight
        if is_quantised(target):
            weight = dense_weight(target) if self.reads_weights else gradient
        for values, row, column in local_parts(weight, grid.stored_columns):
            found = terms(grid, values, gradient)
            add_block_sums(self.step_sums[name], grid, found, row, column, _shards(weight))

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        taken = []
        for name, contribution in self.step_sums.items():
            taken.append((self.sums[name], contribution.clone()))
            contribution.zero_()
        return taken

    def statistics(self) -> Iterator[Tensor]:
        yield from self.sums.values()

    def scores(self) -> dict[str, Tensor]:
        return {name: total.abs().cpu() for name, total in self.sums.items()}


class GradSigned(BlockSums):
    """`grad_signed`: |mean over the block of G|, what the authors' released code ranks by."""

    @contextlib.contextmanager
    def observing(self) -> Generator[None]:
        formed = {name: one for name, one in self.targets.items() if _is_formed(one)}
        linears = {name: one for name, one in self.targets.items() if name not in formed}
        with output_gradients(linears, self._observe), weight_gradients(formed, self._add):
            yield

    def _add(self, name: str, gradient: Tensor) -> None:
        self.reduce(name, gradient, lambda grid, weight, gradient: gradient.float() / grid.block_numel)

    def _observe(self, name: str, linear: Target, x: Tensor) -> Callable[[Tensor], None]:
        rows, columns = self.grids[name].shape
        pooled_x, total = _pool(x, columns), self.step_sums[name]

        def add(dy: Tensor) -> None:
            total.addmm_(_pool(dy, rows).t(), pooled_x)

        return add


def _is_formed(target: Target) -> bool:
    """Return whether `grad_signed` computes the gradient of a target's weight."""
    return is_convolution(target) or is_embedding(target) or is_tensor_parallel(target)


def _pool(features: Tensor, parts: int) -> Tensor:
    """Return means [T, parts] over equal runs of the last dimension of `features` [..., parts * edge], in float32."""
    return features.detach().reshape(-1, parts, features.shape[-1] // parts).mean(2, dtype=torch.float32)


class Reduced(BlockSums):
    """Reduces each weight gradient of a backward to one sum per block."""

    def observing(self) -> contextlib.AbstractContextManager[None]:
        return weight_gradients(self.targets, self._add)

    def _add(self, name: str, gradient: Tensor) -> None:
        self.reduce(name, gradient, self.terms)

    @staticmethod
    def terms(grid: BlockGrid, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return the values to sum over each block, from rows [rows, columns] of the weight and its gradient."""
        raise NotImplementedError


class GradAbs(Reduced):
    """`grad_abs`: sum over t of the mean over the block of |G_t|, where G_t is the gradient of one backward.

    It depends on how the data are split into micro-batches and over DDP's ranks, each of which runs its own backward.
    FSDP2 gives the mean over its ranks; reentrant checkpointing gives one gradient per use of a shared layer.
    """

    @staticmethod
    def terms(grid: BlockGrid, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.float().abs() / grid.block_numel


class Taylor(Reduced):
    """`taylor`: |<W, G>|, to first order the change in loss if the block is removed (SPSFT, section 3.2, eq. 6).

    With batch statistics, batch normalisation cancels any scaling of a row before it, so <W, G> of the row would be 0
    up to rounding, however much the row matters. So the running statistics are used.
    """

    needs_running_statistics = True
    reads_weights = True

    @staticmethod
    def terms(grid: BlockGrid, weight: Tensor, gradient: Tensor) -> Tensor:
        return weight.float() * gradient.float()


def add_block_sums(
    total: Tensor, grid: BlockGrid, values: Tensor, row: int = 0, column: int = 0, factor: int = 1
) -> None:
    """Add `factor` times the block sums of `values` to `total` [R, C].

    Args:
        values: the part of a tensor of the grid's `stored_shape` that starts at `row` and `column`. Its rows may begin
            and end inside a block; its columns may only if they are fewer than a block's.
    """
    height, width = grid.block_shape[::-1] if grid.transposed else grid.block_shape
    values = values.flatten(1)
    sums = values.unflatten(1, (-1, min(width, values.shape[1]))).sum(2)
    sums = F.pad(sums, (0, 0, row % height, -(row + len(sums)) % height)).unflatten(0, (-1, height)).sum(1)
    total = total.t() if grid.transposed else total
    total[row // height :, column // width :][: len(sums), : sums.shape[1]].add_(sums, alpha=factor)


def _shards(weight: Tensor) -> int:
    """Return the number of ranks over which a weight is sharded; replicas do not count."""
    if not is_dtensor(weight):
        return 1
    sizes = zip(weight.device_mesh.shape, weight.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())
