"""Check that the manifest and the tensors of a delta belong together, and to a base. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smt_trainer.arrays import FLOATS, all_finite, cast, dtype_name, wider
from smt_trainer.errors import SMTError, printable
from smt_trainer.manifest import check_keys
from smt_trainer.model.fingerprint import RUN
from smt_trainer.model.hub import split_commit
from smt_trainer.model.names import matches
from smt_trainer.settings import is_int

if TYPE_CHECKING:
    from smt_trainer.delta.delta import Delta

logger = logging.getLogger(__name__)

KEYS = {"format", "fingerprint", "architecture", "unnamed", "weight_dtype", "quantization", "whole", "selection"}


def check_manifest(manifest: dict[str, Any], folder: str | Path) -> None:
    """Raise `SMTError` unless the manifest of a delta has the right fields of the right types."""
    check_keys(manifest, KEYS, f"delta in {folder}")
    dtype, base = manifest["weight_dtype"], manifest["fingerprint"]
    for key in ("whole", "unnamed"):
        if not isinstance(manifest[key], list) or not all(isinstance(name, str) for name in manifest[key]):
            raise SMTError(f"the delta in {folder} is damaged: `{key}` must list names. Save or download it again.")
    if dtype not in FLOATS:
        raise SMTError(
            f"the delta in {folder} is damaged: weight_dtype must be one of {', '.join(FLOATS)}, got {dtype!r}. "
            "Save or download it again."
        )
    well_formed = isinstance(base, dict) and {*base} - {"rows"} == {"dtype", "stride", "checksums", "codes"}
    well_formed = well_formed and base["dtype"] in FLOATS and is_int(base["stride"]) and base["stride"] >= RUN
    # Deltas of older versions have none.
    rows = base.get("rows", {}) if well_formed else None
    well_formed = well_formed and isinstance(rows, dict) and all(is_int(count) and count > 0 for count in rows.values())
    well_formed = well_formed and isinstance(manifest["quantization"], dict | None)
    texts = [manifest["architecture"], *manifest["whole"], *manifest["unnamed"]]
    for sums in (base["checksums"], base["codes"]) if well_formed else [None]:
        texts += [*sums, *sums.values()] if isinstance(sums, dict) else [None]
    if not all(isinstance(text, str) and printable(text) == text for text in texts):
        raise SMTError(
            f"the delta in {folder} is damaged: it should name an architecture, and have a checksum of each tensor of "
            "its base. Save or download it again."
        )


def take_indices(arrays: dict[str, np.ndarray], module: str) -> np.ndarray:
    """Take the positions of a module's blocks out of the stored arrays, as [n, 2] int64; none if it has no blocks."""
    indices = arrays.pop(f"{module}.block_indices", None)
    if indices is None:
        return np.empty((0, 2), np.int64)
    if dtype_name(indices) != "int32" or indices.ndim != 2 or indices.shape[1] != 2 or not len(indices):
        raise SMTError(
            f"the delta is damaged: the block_indices of `{module}` must be int32 of shape [n, 2], got "
            f"{dtype_name(indices)} of shape {list(indices.shape)}. Save or download it again."
        )
    return indices.astype(np.int64)


def check_dtypes(delta: Delta) -> None:
    """Raise `SMTError` unless blocks have the master dtype, or one that holds every value of `weight_dtype`."""
    master = delta.selection.config.master_dtype
    for name, blocks in delta.block_arrays.items():
        dtype = dtype_name(blocks)
        if dtype not in FLOATS or dtype not in (master, wider(dtype, delta.weight_dtype)):
            raise SMTError(
                f"the delta's blocks of `{name}` are {dtype}; expected {delta.weight_dtype}, like its base, or "
                f"{master}, like the masters. The delta is damaged; save or download it again."
            )


def widened(delta: Delta, blocks: np.ndarray) -> np.ndarray:
    """Return blocks in a dtype that also holds the delta's weights; a model may mix dtypes."""
    return cast(blocks, wider(dtype_name(blocks), delta.weight_dtype))


def warn_of_rounding(delta: Delta, dtypes: Mapping[str, str]) -> None:
    """Warn if values of a delta are rounded to the dtype of their destination: the trained model had several dtypes.

    Args:
        delta: its blocks are not checked if they are masters: forward rounded those, too.
        dtypes: name of a module with blocks, or of a whole tensor -> dtype of the tensor that its values go to.
    """
    held = {name: dtype_name(values) for name, values in delta.block_arrays.items()}
    held = held if delta.weight_dtype in held.values() else {}
    held |= {name: dtype_name(values) for name, values in delta.whole_arrays.items()}
    pairs = {name: (held[name], dtype) for name, dtype in dtypes.items() if {held.get(name), dtype} <= {*FLOATS}}
    rounded = [name for name, (ours, theirs) in pairs.items() if wider(ours, theirs) != theirs]
    if rounded:
        logger.warning(
            "The result is not exactly the trained model: %d tensors of the delta are rounded, such as `%s` from %s, "
            "its dtype in training, to %s. Give them that dtype in the base (cast these modules, then load_delta).",
            len(rounded),
            rounded[0],
            *pairs[rounded[0]],
        )


def check_finite(delta: Delta) -> None:
    """Raise `SMTError` if a value is NaN or infinite."""
    for name, values in {**delta.block_arrays, **delta.whole_arrays}.items():
        if not all_finite(values):
            raise SMTError(
                f"the delta's values of `{name}` are not all finite. If training diverged, lower the learning rate; "
                "otherwise the delta is damaged: save or download it again."
            )


def check_whole(delta: Delta) -> None:
    """Raise `SMTError` if a delta holds a whole tensor that its configuration does not train, or none for one of its
    fields (`modules_to_save`, `train_norm`, `train_bias`).

    With `modules_to_save=None`, a new head is trained whole. Only the model can tell its name, so any tensor will do.
    """
    config, tuned = delta.selection.config, delta.selection.block_indices
    modules = config.modules_to_save
    explained = dict.fromkeys(("modules_to_save", "train_norm", "train_bias", "unnamed"), 0)
    for name, values in delta.whole_arrays.items():
        module, _, leaf = name.rpartition(".")
        path = module.split(".")
        parents = [".".join(path[: length + 1]) for length in range(len(path))]
        reasons = {
            "modules_to_save": bool(modules) and any(matches(parent, modules) for parent in parents),
            "train_norm": config.train_norm and values.ndim < 2,
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
            f"the delta holds no tensor that {missing[0]}={getattr(config, missing[0])!r} trains whole. It is "
            "damaged; save or download it again."
        )


def check_base(delta: Delta, name: str | None, differences: list[str], folder: Path | None = None) -> None:
    """Refuse a base that differs from the base of training; warn if only its name differs.

    Args:
        delta: what to put into the base.
        name: the base's name, if known.
        differences: names of the tensors of the base that have other values than in training.
        folder: the delta's, if known, for the message.

    Raises:
        SMTError: there are differences.
    """
    expected, fingerprint = delta.selection.base_model, delta.fingerprint
    if differences:
        where = "" if folder is None else f" in {folder}"
        raise SMTError(
            f"the delta{where} was trained on {expected or 'another base model'}. {name or 'This model'} has other "
            f"values in {len(differences)} of its {len(fingerprint.checksums)} tensors, such as `{differences[0]}`. "
            f"Load the base of training, in {fingerprint.dtype} or a finer dtype; if another delta was merged into it, "
            "merge that one first (smt merge BASE EARLIER OUT) and give OUT as the base."
        )
    if expected and name and split_commit(expected)[0].split("/")[-1] != split_commit(name)[0].split("/")[-1]:
        logger.warning("The delta names %s as its base. This model is %s; the weights agree.", expected, name)
