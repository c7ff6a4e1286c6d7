"""Deltas of tiny bases, for the tests of arithmetic on deltas."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from torch import Tensor, nn

from smt_trainer import BlockSelection, convert_to_smt, save_delta
from smt_trainer.delta.delta import Delta


def train(model: nn.Module, folder: Path, seed: int = 0, selection: BlockSelection | None = None, **fields) -> Path:
    """Randomly change all that a converted model trains; save the delta and return its folder."""
    convert_to_smt(model, selection or tiny.choose(model, tiny.config(score="random", **fields), seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (torch.randn(parameter.shape, generator=generator) / 8).to(parameter.dtype)
    save_delta(model, folder)
    model.config.save_pretrained(folder)
    return folder


def put(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights overwritten by the values of a delta: merging without a check of the base."""
    delta, weights = Delta.load(folder), {key: tensor.clone() for key, tensor in weights.items()}
    for name, blocks in delta.blocks.items():
        indices = torch.from_numpy(delta.selection.block_indices[name])
        delta.selection.grids[name].scatter_(weights[f"{name}.weight"], indices, blocks)
    for name, values in delta.whole.items():
        weights[name].copy_(values)
    return weights


def halves(selection: BlockSelection) -> list[BlockSelection]:
    """Split a selection into two of alternating blocks, in the same modules."""
    return [
        BlockSelection(
            selection.grids,
            {name: indices[start::2] for name, indices in selection.block_indices.items() if len(indices[start::2])},
            selection.num_parameters,
            selection.config,
        )
        for start in (0, 1)
    ]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that two checkpoints hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key
