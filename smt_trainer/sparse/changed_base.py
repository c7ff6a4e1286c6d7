"""Warn if a model no longer has the values of the checkpoint that it was loaded from.

Its delta would fit no checkpoint then. The fingerprint samples large tensors, so token embeddings, of which a script
may set a single row, are compared in full.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from torch import nn

from smt_trainer.arrays import FLOATS, as_array, bits, cast, dtype_name
from smt_trainer.model.base import base_checkpoint, lost_base
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.conversion import differences
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.language_model import vocabulary_weights
from smt_trainer.model.merged import is_merged
from smt_trainer.model.names import find_names
from smt_trainer.model.sharded import is_sharded

logger = logging.getLogger(__name__)

# Rows of an embedding that are compared at a time.
ROWS = 4096


def warn_of_changed_base(model: nn.Module, base: Fingerprint) -> None:
    """Warn if a plain model has other values than its checkpoint, as far as that can be read; or if it is not found.

    A model that a delta was merged into is left out: the trainer warns of it.

    Args:
        model: plain.
        base: its fingerprint.
    """
    # Only the first rank is sure to have the values.
    if is_merged(model) or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return
    checkpoint = base_checkpoint(model)
    if checkpoint is None:
        if (name := lost_base(model)) is not None:
            logger.warning(
                "%s, which this model was loaded from, is not found: not from this working folder, nor in the hub's "
                "cache. So changes since then are not seen, such as new tokens, whose rows would be neither trained "
                "nor stored. Load it by an absolute path; a hub cache elsewhere goes into HF_HUB_CACHE.",
                name,
            )
        return
    changed = {
        *differences(base, checkpoint),
        *_changed_embeddings(model, base, checkpoint),
    }
    if changed:
        logger.warning(
            "%d tensors of this model, such as `%s`, have other values than in %s, which it was loaded from: its delta "
            "will not fit that checkpoint. Save the model first, with save_pretrained, and train it from there.",
            len(changed),
            min(changed),
            checkpoint.folder,
        )


def _changed_embeddings(model: nn.Module, base: Fingerprint, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the names of token embeddings with other values than in a checkpoint; new rows are left out."""
    # Others are tied to these, or stored in the delta.
    names = [name for name in vocabulary_weights(model) if name in base.checksums]
    for name, key in find_names(names, checkpoint.tensors).items():
        weight, stored = model.get_parameter(name).detach(), checkpoint.array(checkpoint.tensors[key])
        if is_sharded(weight) or weight.is_meta or dtype_name(stored) not in FLOATS:
            continue
        for first in range(0, min(len(weight), len(stored)), ROWS):
            rows = slice(first, min(first + ROWS, len(weight), len(stored)))
            ours = as_array(weight[rows])
            if not np.array_equal(bits(ours), bits(cast(stored[rows], dtype_name(ours)))):
                yield name
                break
