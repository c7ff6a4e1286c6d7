"""Merge a delta of a quantised base: write the trained model dense, and log how far a merged one is from it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smt_trainer.arrays import as_array
from smt_trainer.delta.load import as_config, from_delta
from smt_trainer.merging.logit_difference import compare_with_merged
from smt_trainer.merging.side_files import copy_others
from smt_trainer.model.checkpoint import CONFIG_FILE, Checkpoint
from smt_trainer.model.quantised import floating_dtype
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.dequantise import dense_state_dict

if TYPE_CHECKING:
    import numpy as np

    from smt_trainer.delta.delta import Delta

logger = logging.getLogger(__name__)


def load_trained(checkpoint: Checkpoint, delta_folder: Path, quantization: dict[str, Any] | None) -> Any:
    """Return the trained model: the base quantised as in training, and the blocks separate.

    Args:
        checkpoint: the base, plain or stored quantised.
        delta_folder: a delta folder.
        quantization: the `quantization_config` that the delta records.

    Raises:
        SMTError: the base is another one, or has other values than in training once quantised.
    """
    how = {} if checkpoint.is_quantised else {"quantization_config": as_config(quantization)}
    return from_delta(delta_folder, base=str(checkpoint.folder), merge=False, **how).eval()


def write_dequantised(trained: Any, checkpoint: Checkpoint, delta_folder: Path, stage: Path) -> None:
    """Write a trained model with dense weights as a plain checkpoint, with the other files of base and training."""
    copy_others(checkpoint, delta_folder, stage)
    for name in (CONFIG_FILE, checkpoint.index):
        if name is not None:
            (stage / name).unlink(missing_ok=True)
    save_dequantised(trained, stage)


def save_dequantised(model: Any, folder: Path) -> None:
    """Write the model that `merge_and_unload(model, onto="dequantized")` would make, without changing this one."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).to(floating_dtype(model))
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict=dense_state_dict(model))


def values_under_blocks(trained: Any, delta: Delta, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return module -> the dequantised values [n, br, bc] of a trained model's base under the blocks of a delta."""
    linears, found = dict(block_modules(trained)), {}
    for name in names:
        indices = torch.from_numpy(delta.selection.block_indices[name])
        found[name] = as_array(linears[name].grid.gather(linears[name].base_weight(), indices))
    return found


def log_difference(trained: Any, merged: Path) -> None:
    """Log how far a merged checkpoint is from the trained model."""
    found = compare_with_merged(trained, merged)
    if found is not None:
        logger.info("The merged model compared with the trained one %s.", found)
