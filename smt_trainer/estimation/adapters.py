"""Add LoRA's adapters to a model on the meta device, computing as PEFT does; see `estimate.py` for their rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt_trainer.model.whole import get_whole
from smt_trainer.selection.block_selection import BlockSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def equal_rank(selection: BlockSelection) -> int:
    """Return the rank at which adapters on all targets hold as many weights as the blocks."""
    return max(1, round(selection.trainable_parameters / sum(sum(g.weight_shape) for g in selection.grids.values())))


def with_adapters(
    model: PreTrainedModel, selection: BlockSelection, whole: Iterable[str], rank: int
) -> PreTrainedModel:
    """Freeze a model except for LoRA's adapters on all targets and what is trained whole."""
    model.requires_grad_(False)
    for name, grid in selection.grids.items():
        linear = model.get_submodule(name)
        rows, columns = grid.weight_shape[::-1] if grid.embedding else grid.weight_shape
        linear.lora_a = nn.Parameter(torch.empty(rank, columns, device="meta"))
        linear.lora_b = nn.Parameter(torch.empty(rows, rank, device="meta"))
        linear.register_forward_hook(_adapt_embedding if grid.embedding else _adapt)
    for name in whole:
        get_whole(model, name).requires_grad_(True)
    return model


def _adapt(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return y + s B A x in the adapters' dtype, as PEFT computes it."""
    a, b = linear.get_parameter("lora_a"), linear.get_parameter("lora_b")
    x = inputs[0].to(a.dtype)
    return (output + F.linear(F.linear(x, a), b) * 2.0).to(output.dtype)


def _adapt_embedding(embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return y + s B A[:, ids] in the adapters' dtype, as PEFT computes it."""
    a, b = embedding.get_parameter("lora_a"), embedding.get_parameter("lora_b")
    return (output + F.embedding(inputs[0], a.T) @ b.T * 2.0).to(output.dtype)
