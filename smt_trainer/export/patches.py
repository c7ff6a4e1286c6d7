"""Stream what a delta, or a model in training, changes in a checkpoint as weight patches (`weight_patch.py`).

Sparse patches come before dense ones, since servers take them in separate calls. All together they set the trained
weights to the values that merging writes, whatever they were before: so the patches of the last step suffice, and a
missed step does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from smt_trainer.arrays import as_tensor, cast
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.errors import SMTError
from smt_trainer.export.weight_patch import (
    MAX_BYTES,
    WeightPatch,
    check_max_bytes,
    patches_of_blocks,
    patches_of_whole,
)
from smt_trainer.merging.plan import MergePlan
from smt_trainer.model.checkpoint import Checkpoint, find_checkpoint
from smt_trainer.model.sharded import full_tensor
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import get_state, has_quantised_blocks
from smt_trainer.sparse.whole_tensors import WholeTensors


def delta_patches(
    base: str | Path,
    delta: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    onto: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[WeightPatch]:
    """Return the patches that turn a base checkpoint into the one that `merge_checkpoint` writes.

    Names, dtypes and shapes are those of the checkpoint on disk. A tied tensor that it stores twice is patched
    under both names, as merging writes it.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        delta: folder or hub name of the delta.
        base_revision: revision of a base on the hub.
        delta_revision: revision of a delta on the hub.
        onto: "original" to put a delta of a quantised base into the weights that were quantised.
        max_bytes: bound on the bytes of values and indices of a patch; larger tensors are split into several.

    Returns:
        An iterator. Everything is checked before it is returned; the patches are on the CPU.

    Raises:
        SMTError: as in `merge_checkpoint`; the delta has another vocabulary than the base; or `onto` is "dequantized",
            which changes all quantised weights.
    """
    check_max_bytes(max_bytes)
    if onto == DEQUANTIZED:
        raise SMTError(
            "patches change some weights of a checkpoint, and onto='dequantized' replaces all quantised ones. Merge, "
            "and load the merged checkpoint."
        )
    checkpoint = Checkpoint.open(find_checkpoint(base, base_revision))
    plan = MergePlan.load(find_delta(delta, delta_revision), checkpoint, onto)
    if plan.is_resized:
        raise SMTError(
            "the delta has another vocabulary than its base, and a patch cannot change the shape of a tensor. Merge, "
            "and load the merged checkpoint."
        )
    return _of_plan(plan, max_bytes)


def _of_plan(plan: MergePlan, max_bytes: int) -> Iterator[WeightPatch]:
    for key, site in ((key, site) for key, sites in plan.sites.items() for site in sites):
        stored = plan.tensors[key]
        indices, blocks = torch.from_numpy(site.block_indices), as_tensor(cast(site.blocks, stored.dtype))
        stacked = None if site.expert is None else (site.expert, stored.shape[0])
        yield from patches_of_blocks(key, site.grid, indices, blocks, max_bytes, stacked)
    whole = {key: as_tensor(cast(values, plan.tensors[key].dtype)) for key, values in plan.whole.items()}
    yield from patches_of_whole(whole, max_bytes)


def model_patches(model: nn.Module, *, max_bytes: int = MAX_BYTES) -> Iterator[WeightPatch]:
    """Return the patches that turn the base of a model in training into the model as it is now.

    Names are those of the plain model's parameters and buffers; a checkpoint that transformers renames on loading has
    others. A tied tensor is patched once, under its name in a delta: the server ties it itself.

    Args:
        model: rewritten by `convert_to_smt`, `load_delta` or SMTTrainer.
        max_bytes: as in `delta_patches`.

    Returns:
        An iterator, which reads the model as it goes: exhaust it before the next step. The patches are on the model's
        device, in the dtype of its weights. A collective when the model is sharded: every rank must exhaust it.

    Raises:
        SMTError: the model trains no blocks, or its quantised weights cannot hold them; or, while iterating, a value is
            NaN.
    """
    check_max_bytes(max_bytes)
    get_state(model)
    if has_quantised_blocks(model):
        raise SMTError(
            "the blocks of this model lie in quantised weights, which cannot hold them, so there is nothing to patch. "
            "Train on the base without quantization_config."
        )
    return _of_model(model, max_bytes)


def _of_model(model: nn.Module, max_bytes: int) -> Iterator[WeightPatch]:
    for name, linear in block_modules(model):
        blocks = full_tensor(linear.blocks).to(linear.weight_dtype)
        key, indices = linear.weight_name(name), linear.block_indices
        yield from patches_of_blocks(key, linear.grid, indices, blocks, max_bytes, linear.stacked)
    yield from patches_of_whole(
        {name: full_tensor(tensor) for name, tensor in WholeTensors.of(model).tensors.items()}, max_bytes
    )
