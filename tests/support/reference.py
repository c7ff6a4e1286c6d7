"""Slow twins of what the library computes fast: plain loops that a reader can check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn

from smt_trainer.model.grid import BlockGrid


def block(weight: Tensor, grid: BlockGrid, row: int, column: int) -> Tensor:
    """Slice block (row, column) out of a weight as it is stored."""
    br, bc = grid.block_shape
    return (weight.T if grid.transposed else weight)[row * br : (row + 1) * br, column * bc : (column + 1) * bc]


def block_scores(weight: Tensor, grid: BlockGrid, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the `score` of every block, [R, C], computed one block at a time."""
    rows, columns = grid.shape
    return torch.stack([torch.stack([score(block(weight, grid, r, c)) for c in range(columns)]) for r in range(rows)])


def block_mask(grid: BlockGrid, block_indices: Tensor) -> Tensor:
    """Return a mask in the shape of the stored weight, True in the blocks."""
    mask = torch.zeros(grid.stored_shape, dtype=torch.bool)
    for row, column in block_indices.tolist():
        block(mask, grid, row, column).fill_(True)
    return mask


def cell_shares(rows: int, columns: int, chosen: set[int], most: tuple[int, int]) -> list[list[float]]:
    """Return the share of `chosen` flat positions in each cell when a grid is drawn with at most `most` cells."""
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
    """Return all blocks, best first; equal scores by module order, then row by row."""
    blocks = [
        (-score[row, column].item(), place, row, column, name)
        for place, (name, score) in enumerate(scores.items())
        for row in range(score.shape[0])
        for column in range(score.shape[1])
    ]
    return [(name, row, column) for _, _, row, column, name in sorted(blocks)]


def blocks_within(ranking: list[tuple[str, int, int]], grids: dict[str, BlockGrid], wanted: float) -> int:
    """Count the best blocks whose weights come nearest to `wanted`: at least one, and in a tie the larger count."""
    totals, total = [], 0
    for name, _, _ in ranking:
        total += grids[name].block_numel
        totals.append(total)
    return min(range(len(totals)), key=lambda i: (abs(totals[i] - wanted), -i)) + 1


def under_cap(
    ranking: list[tuple[str, int, int]], grids: dict[str, BlockGrid], layer_of: dict[str, str], cap: int | float
) -> list[tuple[str, int, int]]:
    """Return a ranking within the cap: each layer gives its best blocks, up to the first that does not fit."""
    kept, blocks, weights, full = [], Counter(), Counter(), set()
    for entry in ranking:
        layer = layer_of[entry[0]]
        total = sum(grid.num_blocks * grid.block_numel for name, grid in grids.items() if layer_of[name] == layer)
        blocks[layer] += 1
        weights[layer] += grids[entry[0]].block_numel
        if blocks[layer] > cap if isinstance(cap, int) else weights[layer] > Fraction(str(cap)) * total:
            full.add(layer)
        if layer not in full:
            kept.append(entry)
    return kept


def summed_gradients(
    model: nn.Module, modules: Iterable[str], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Sum the full gradients of the named linears' weights over the batches, by autograd on the whole model."""
    model.requires_grad_(True)
    model.zero_grad()
    for inputs in batches:
        model(**inputs).loss.backward()
    gradients = {name: model.get_submodule(name).weight.grad for name in modules}
    model.zero_grad()
    return gradients


def examples_of_class(inputs: dict[str, Tensor], classes: Tensor, label: int) -> tuple[dict[str, Tensor], float]:
    """Return the examples of one class in a batch of equally long examples, and their share of the batch's loss."""
    mine = classes == label
    return {key: value[mine] for key, value in inputs.items()}, mine.float().mean().item()


def taylor(weight: Tensor, gradient: Tensor, grid: BlockGrid) -> Tensor:
    """Return |<W, G>| of every block [R, C]."""
    return block_scores(weight.detach() * gradient, grid, lambda terms: terms.sum().abs())


def quantile_mean(scores: list[Tensor]) -> Tensor:
    """Return the elementwise mean of the 0, 10, ..., 100 % quantiles of tensors [R, C]."""
    mean = torch.zeros_like(scores[0])
    for row, column in torch.cartesian_prod(*map(torch.arange, mean.shape)).tolist():
        values = sorted(score[row, column].item() for score in scores)
        for k in range(11):
            place = (len(values) - 1) * k / 10
            below = int(place)
            above = min(below + 1, len(values) - 1)
            mean[row, column] += (values[below] + (place - below) * (values[above] - values[below])) / 11
    return mean


def inputs_of_linears(model: nn.Module, modules: Iterable[str], batches: Iterable[dict[str, Tensor]]) -> dict:
    """Return module name -> [tokens, I], all inputs of the named linears."""
    seen, handles = {name: [] for name in modules}, []
    for name, inputs in seen.items():
        keep = lambda _, args, inputs=inputs: inputs.append(args[0].detach().flatten(0, -2))  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    for inputs in batches:
        model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def train_only(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Make the named linears trainable where their mask is True; elsewhere the gradient is set to 0."""
    model.requires_grad_(False)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.requires_grad_(True)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's correlation: Pearson's of ranks, where a rank counts lower numbers and half the equal ones."""
    ranks = [
        [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values] for values in (first, second)
    ]
    centred = [[rank - sum(column) / len(column) for rank in column] for column in ranks]
    products = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in centred] for one in centred]
    return products[0][1] / math.sqrt(products[0][0] * products[1][1])


def recorded_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return module name -> input [tokens, I] of each linear in a forward pass, `Conv1D`s included."""
    found = {}

    def record(name: str) -> Callable:
        return lambda module, args: found.update({name: args[0].flatten(0, -2).clone()})

    linears = {name: module for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in linears.items()]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def with_row(model: nn.Module, source: str, row: int, factor: float, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the `recorded_inputs` when one row of a linear, bias included, is multiplied by a factor."""
    linear = model.get_submodule(source)
    weight = linear.weight.data.T if type(linear).__name__ == "Conv1D" else linear.weight.data
    parts = [part[row] for part in (weight, getattr(linear, "bias", None)) if part is not None]
    before = [part.detach().clone() for part in parts]
    for part in parts:
        part.data.mul_(factor)
    found = recorded_inputs(model, inputs)
    for part, value in zip(parts, before, strict=True):
        part.data.copy_(value)
    return found
