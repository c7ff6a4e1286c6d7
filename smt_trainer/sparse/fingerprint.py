"""The fingerprint of a base: a checksum of the chosen blocks before training.

SHA-256 over the blocks' base values, rounded to the dtype of training and written as float32. The rounding makes the
same base give the same fingerprint in whatever dtype it is loaded, as long as that is no coarser.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from smt_trainer.model.sharded import full_tensor
from smt_trainer.selection.block_selection import BlockSelection


def fingerprint(model: nn.Module, selection: BlockSelection, dtype: torch.dtype) -> str:
    """Return the fingerprint of a plain model; a collective when it is sharded."""
    digest = hashlib.sha256()
    for name in selection.block_indices:
        update_fingerprint(digest, name, full_tensor(model.get_parameter(f"{name}.weight")), selection, dtype)
    return digest.hexdigest()


def update_fingerprint(digest, name: str, weight: Tensor, selection: BlockSelection, dtype: torch.dtype) -> None:
    """Add the chosen blocks of one module to a fingerprint; modules come in the selection's order."""
    blocks = selection.grids[name].gather(weight, selection.block_indices[name])
    digest.update(name.encode())
    digest.update(blocks.to(dtype).float().cpu().contiguous().numpy().data)
