"""Convert weight patches to vLLM's own classes. vLLM has two, one for the server and one for the trainer:

    `to_vllm`           CheckpointWeightPatch (vLLM #50723)   what its loader takes, in the engine's process:
                        `load_checkpoint_weight_patches(model, patches)`, sparse and dense ones in separate calls
    `to_sparse_nccl`    SparseWeightPatch (vLLM #53751)       what a trainer sends to a server that was started with the
                        weight transfer backend "sparse_nccl": `engine.send_weights(patches)`

In both cases vLLM applies them in place and cannot undo them: after an error, the server must be restarted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from smt_trainer.errors import SMTError
from smt_trainer.export.weight_patch import WeightPatch

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.sparse_nccl_engine import (  # pyrefly: ignore[missing-import]
        SparseWeightPatch,
    )
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # pyrefly: ignore[missing-import]
        CheckpointWeightPatch,
    )


def to_vllm(patches: Iterable[WeightPatch]) -> Iterator[CheckpointWeightPatch]:
    """Convert patches from `model_patches` or `delta_patches` to the class that vLLM's loader takes.

    Raises:
        SMTError: vLLM is not installed, or does not have this class.
    """
    try:
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # pyrefly: ignore[missing-import]
            CheckpointWeightPatch,
        )
    except ImportError as error:
        raise _missing("CheckpointWeightPatch", "#50723") from error
    return (
        CheckpointWeightPatch(
            name=patch.name, shape=patch.shape, dtype=patch.dtype, values=patch.values, indices=patch.indices
        )
        for patch in patches
    )


def to_sparse_nccl(patches: Iterable[WeightPatch]) -> Iterator[SparseWeightPatch]:
    """Convert patches from `model_patches` or `delta_patches` to the class that vLLM's "sparse_nccl" engine sends.

    It sends no dense patches, so these get the indices of all their values.

    Raises:
        SMTError: vLLM is not installed, or does not have this class; while iterating, a patch does not hold floats, or
            its tensor has more than 2^31 values.
    """
    try:
        from vllm.distributed.weight_transfer.sparse_nccl_engine import (  # pyrefly: ignore[missing-import]
            SparseWeightPatch,
        )
    except ImportError as error:
        raise _missing("SparseWeightPatch", "#53751") from error
    return (
        SparseWeightPatch(name=patch.name, indices=_indices(patch), values=patch.values, full_shape=patch.shape)
        for patch in patches
    )


def _indices(patch: WeightPatch) -> torch.Tensor:
    indices = patch.indices
    if indices is None and patch.dtype.is_floating_point and patch.values.numel() <= 2**31:
        return torch.arange(patch.values.numel(), dtype=torch.int32, device=patch.values.device)
    if indices is None or indices.dtype != torch.int32:
        raise SMTError(
            f"sparse_nccl takes floats at indices of int32, and the patch of `{patch.name}` {list(patch.shape)} is of "
            f"{patch.dtype}{'' if indices is None else f' at {indices.dtype}'}. Merge, and load the merged checkpoint."
        )
    return indices


def _missing(name: str, pull_request: str) -> SMTError:
    return SMTError(
        f"this needs the class {name} of vLLM (pull request {pull_request}), which is not installed. Install a newer "
        "vLLM (pip install -U vllm) in this environment."
    )
