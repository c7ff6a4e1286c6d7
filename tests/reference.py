"""The slow twins: what the library computes fast, as plain loops that can be checked by eye."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from smt_trainer.blocks import BlockGrid


def block(weight: Tensor, grid: BlockGrid, row: int, column: int) -> Tensor:
    """Block (row, column) of a weight as it is stored, by slicing."""
    br, bc = grid.block_shape
    return (weight.T if grid.transposed else weight)[row * br : (row + 1) * br, column * bc : (column + 1) * bc]


def block_scores(weight: Tensor, grid: BlockGrid, score: Callable[[Tensor], Tensor]) -> Tensor:
    """`score` of every block [R, C], one block at a time."""
    rows, columns = grid.shape
    return torch.stack([torch.stack([score(block(weight, grid, r, c)) for c in range(columns)]) for r in range(rows)])


def block_mask(grid: BlockGrid, block_indices: Tensor) -> Tensor:
    """True, in the shape of the stored weight, where a weight lies in one of the blocks."""
    mask = torch.zeros(grid.stored_shape, dtype=torch.bool)
    for row, column in block_indices.tolist():
        block(mask, grid, row, column).fill_(True)
    return mask


def cell_shares(rows: int, columns: int, chosen: set[int], most: tuple[int, int]) -> list[list[float]]:
    """The share of chosen blocks, by flat position, in each cell of a grid that is drawn with at most so many cells."""
    height, width = -(-rows // most[0]), -(-columns // most[1])
    cells = [
        [
            [
                r * columns + c in chosen
                for r in range(rows)[top : top + height]
                for c in range(columns)[left : left + width]
            ]
            for left in range(0, columns, width)
        ]
        for top in range(0, rows, height)
    ]
    return [[sum(cell) / len(cell) for cell in line] for line in cells]


def ranked(scores: dict[str, Tensor]) -> list[tuple[str, int, int]]:
    """All blocks, best first; equal scores by module order, then row by row."""
    blocks = [
        (-score[row, column].item(), place, row, column, name)
        for place, (name, score) in enumerate(scores.items())
        for row in range(score.shape[0])
        for column in range(score.shape[1])
    ]
    return [(name, row, column) for _, _, row, column, name in sorted(blocks)]


def blocks_within(ranking: list[tuple[str, int, int]], grids: dict[str, BlockGrid], wanted: float) -> int:
    """How many of the best blocks hold a number of weights nearest to `wanted`: at least one; the larger of two."""
    totals, total = [], 0
    for name, _, _ in ranking:
        total += grids[name].block_numel
        totals.append(total)
    return min(range(len(totals)), key=lambda i: (abs(totals[i] - wanted), -i)) + 1


def summed_gradients(
    model: nn.Module, modules: Iterable[str], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Full gradients of the named linears' weights, summed over the batches by autograd on the whole model."""
    model.requires_grad_(True)
    model.zero_grad()
    for inputs in batches:
        model(**inputs).loss.backward()
    gradients = {name: model.get_submodule(name).weight.grad for name in modules}
    model.zero_grad()
    return gradients


def train_only(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Make the named linears trainable where their mask is True: the gradient is set to zero elsewhere."""
    model.requires_grad_(False)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.requires_grad_(True)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model
