"""Check that the manifest and the tensors of a delta belong together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError, printable
from smt_trainer.manifest import check_keys
from smt_trainer.model import targets
from smt_trainer.model.names import matches, plain_name
from smt_trainer.settings import is_int
from smt_trainer.sparse.fingerprint import RUN

if TYPE_CHECKING:
    from smt_trainer.delta.delta import Delta

KEYS = {"format", "fingerprint", "architecture", "unnamed", "weight_dtype", "whole", "selection"}
WEIGHT_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in targets.WEIGHT_DTYPES}


def check_manifest(manifest: dict[str, Any], folder: str | Path) -> None:
    """Raise `SMTError` unless the manifest of a delta has the right fields of the right types."""
    check_keys(manifest, KEYS, f"delta in {folder}")
    dtype, base = manifest["weight_dtype"], manifest["fingerprint"]
    for key in ("whole", "unnamed"):
        if not isinstance(manifest[key], list) or not all(isinstance(name, str) for name in manifest[key]):
            raise SMTError(f"the delta in {folder} is damaged: `{key}` must list names. Save or download it again.")
    if not isinstance(dtype, str) or dtype not in WEIGHT_DTYPES:
        raise SMTError(
            f"the delta in {folder} is damaged: weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {dtype!r}. "
            "Save or download it again."
        )
    well_formed = isinstance(base, dict) and set(base) == {"dtype", "stride", "checksums"}
    well_formed = well_formed and base["dtype"] in WEIGHT_DTYPES and is_int(base["stride"]) and base["stride"] >= RUN
    sums = base["checksums"] if well_formed else None
    texts = [manifest["architecture"], *manifest["whole"], *manifest["unnamed"]]
    texts += [*sums, *sums.values()] if isinstance(sums, dict) else [None]
    if not all(isinstance(text, str) and printable(text) == text for text in texts):
        raise SMTError(
            f"the delta in {folder} is damaged: it should name an architecture, and have a checksum of each tensor of "
            "its base. Save or download it again."
        )


def take_indices(tensors: dict[str, Tensor], module: str) -> Tensor:
    """Take the positions of a module's blocks out of the stored tensors, as [n, 2] int64; none if it has no blocks."""
    indices = tensors.pop(f"{module}.block_indices", None)
    if indices is None:
        return torch.empty(0, 2, dtype=torch.long)
    if indices.dtype != torch.int32 or indices.ndim != 2 or indices.shape[1] != 2 or not len(indices):
        raise SMTError(
            f"the delta is damaged: the block_indices of `{module}` must be int32 of shape [n, 2], got {indices.dtype} "
            f"of shape {list(indices.shape)}. Save or download it again."
        )
    return indices.long()


def check_dtypes(delta: Delta) -> None:
    """Raise `SMTError` unless blocks have the master dtype, or one that holds every value of `weight_dtype`."""
    master = WEIGHT_DTYPES[delta.selection.config.master_dtype]
    for name, blocks in delta.blocks.items():
        if blocks.dtype not in WEIGHT_DTYPES.values() or blocks.dtype not in (master, widened(delta, blocks).dtype):
            raise SMTError(
                f"the delta's blocks of `{name}` are {blocks.dtype}; expected {delta.weight_dtype}, as its base, or "
                f"{master}, as the masters. It is damaged; save or download it again."
            )


def widened(delta: Delta, blocks: Tensor) -> Tensor:
    """Return blocks in a dtype that also holds the delta's weights; a model may mix dtypes."""
    return blocks.to(torch.promote_types(blocks.dtype, delta.weight_dtype))


def check_finite(delta: Delta) -> None:
    """Raise `SMTError` if a value is NaN or infinite."""
    for name, tensor in {**delta.blocks, **delta.whole}.items():
        if tensor.is_floating_point() and not (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all():
            raise SMTError(
                f"the delta's values of `{name}` are not all finite. If training diverged, lower the learning rate; "
                "else the delta is damaged: save or download it again."
            )


def check_whole(delta: Delta) -> None:
    """Raise `SMTError` unless a delta's configuration explains what it holds whole, and nothing is missing altogether.

    Without `modules_to_save`, what is new in the model is trained whole; only the model can tell what that is.
    """
    config, tuned = delta.selection.config, delta.selection.block_indices
    modules = config.modules_to_save
    explained = dict.fromkeys(("modules_to_save", "train_norm", "train_bias", "unnamed"), 0)
    for name, tensor in delta.whole.items():
        module, _, leaf = name.rpartition(".")
        path = module.split(".")
        parents = [".".join(path[: length + 1]) for length in range(len(path))]
        reasons = {
            "modules_to_save": bool(modules) and any(matches(parent, modules) for parent in parents),
            "train_norm": config.train_norm and tensor.ndim < 2,
            "train_bias": config.train_bias and leaf == "bias" and module in tuned,
            "unnamed": name in delta.unnamed,
        }
        for reason, holds in reasons.items():
            explained[reason] += holds
        if (module in tuned and leaf != "bias") or not (modules is None or any(reasons.values())):
            raise SMTError(
                f"the delta holds `{name}` whole, which its configuration does not train (modules_to_save={modules!r}, "
                f"train_norm={config.train_norm}, train_bias={config.train_bias}). It is damaged; save it again."
            )
    missing = [reason for reason, count in explained.items() if getattr(config, reason, False) and not count]
    if missing:
        raise SMTError(
            f"the delta holds nothing of what {missing[0]}={getattr(config, missing[0])!r} trains whole. It is "
            "damaged; save or download it again."
        )


def check_complete(model: nn.Module, delta: Delta, names: Iterable[str]) -> None:
    """Raise `SMTError` unless a delta holds whole what a plain model trains whole, and no other parameter of it.

    Args:
        model: a plain model.
        delta: for this model.
        names: modules and biases that the model trains whole under the delta's configuration.
    """
    prefixes = tuple(f"{name}." for name in names)
    tensors = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    wanted = {id(tensor): name for name, tensor in tensors.items() if f"{name}.".startswith(prefixes)}
    found = {id(tensors[name]): name for name in delta.whole if name in tensors}
    missing = [name for key, name in wanted.items() if key not in found]
    strange = [name for key, name in found.items() if key not in wanted and isinstance(tensors[name], nn.Parameter)]
    strange = [name for name in strange if name not in delta.unnamed]
    if missing or strange:
        raise SMTError(
            f"the delta {'lacks' if missing else 'holds'} `{(missing or strange)[0]}`, which this model "
            f"{'trains' if missing else 'does not train'} whole under the delta's configuration. It is damaged, or the "
            "model is of another class than in training."
        )
