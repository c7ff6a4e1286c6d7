"""Plan a merge: find the tensors that a delta changes, check that it fits, write it into copies of the files.

Files are mapped into memory, so only the pages with trained values are read and written.

torch is imported only where `model/conversion.py` has to ask transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smt_trainer.arrays import FLOATS, INTEGERS, cast, dtype_name
from smt_trainer.delta.checks import check_base, warn_of_rounding
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import LAYERS, load_config
from smt_trainer.delta.onto import WAYS, check_onto, quantised_names
from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically
from smt_trainer.merging.expert_files import IN_MEMORY
from smt_trainer.merging.locate import find_grown, find_keys, find_parts, find_sites, refuse_missing
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.merging.site import Site
from smt_trainer.merging.tied import tied_copies
from smt_trainer.model.checkpoint import BASE, Checkpoint, vocabulary_sizes
from smt_trainer.model.conversion import differences, look_up
from smt_trainer.tensor_file import load_arrays, open_array, save_arrays
from smt_trainer.tensor_header import StoredTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergePlan:
    """A delta and where its values go in a checkpoint.

    Attributes:
        delta: the trained values.
        parts: module with blocks -> where its weight lies in the checkpoint.
        keys: whole tensor of the delta -> its name in the checkpoint; without tensors that are new in the model.
        sites: tensor name in the checkpoint -> the blocks that lie in it.
        whole: tensor name in the checkpoint -> the tensor that replaces it, with other rows if the vocabulary changed.
        tensors: name of each of these tensors -> where it lies in the files.
        vocabulary: sizes of the vocabulary in training.
        grown: names of those in `whole` that join the base's rows and rows of new tokens, which are stored as blocks.
    """

    delta: Delta
    parts: dict[str, list[MatrixRows]]
    keys: dict[str, str]
    sites: dict[str, list[Site]]
    whole: dict[str, np.ndarray]
    tensors: dict[str, StoredTensor]
    vocabulary: set[int]
    grown: list[str]

    @classmethod
    def load(cls, delta_folder: Path, checkpoint: Checkpoint, onto: str | None = None) -> MergePlan:
        """Read a delta and find its tensors in a checkpoint.

        Raises:
            SMTError: the delta is damaged, or belongs to another base; or `onto` is missing or does not apply.
        """
        delta = Delta.load(delta_folder)
        check_onto(delta, onto, is_quantised=checkpoint.is_quantised)
        if checkpoint.is_quantised and quantised_names(delta):
            raise SMTError(f"the quantised weights of {checkpoint.folder} cannot hold the trained blocks. {WAYS}")
        refuse_other_depth(delta_folder, checkpoint)
        plan = cls.of(delta, delta_folder, checkpoint)
        refuse_missing([name for name in delta.whole_arrays if name not in plan.keys], checkpoint.folder)
        for dtype in plan.other_dtypes:
            logger.warning(
                "The delta was trained on %s weights and is merged into %s ones. The result is not exactly the "
                "trained model.",
                delta.weight_dtype,
                dtype,
            )
        if not plan.other_dtypes:
            warn_of_rounding(delta, plan.dtypes)
        return plan.with_tied(checkpoint)

    @classmethod
    def of(cls, delta: Delta, delta_folder: Path, checkpoint: Checkpoint) -> MergePlan:
        """Find the tensors of a delta in a checkpoint, without whole ones that are new in the model.

        Raises:
            SMTError: the checkpoint lacks a weight that has blocks, or the delta belongs to another base.
        """
        parts = find_parts(delta, checkpoint)
        keys, sites = find_keys(delta, checkpoint), find_sites(delta, parts, checkpoint)
        whole = {keys[name]: values for name, values in delta.whole_arrays.items() if name in keys}
        grown = find_grown(delta, sites, checkpoint)
        sites = {key: found for key, found in sites.items() if key not in grown}
        found_in = [part for found in parts.values() for part in found if part.key not in grown]
        used = [(part.key, part.expert, part.among) for part in found_in]
        if len(whole) < len(keys) or len(set(used)) < len(used) or whole.keys() & sites.keys():
            raise SMTError(f"two names in the delta stand for one tensor of {checkpoint.folder}. The delta is damaged.")
        whole |= grown
        tensors = {key: checkpoint.tensors[key] for key in [*sites, *whole]}
        vocabulary = vocabulary_sizes(load_config(delta_folder))
        plan = cls(delta, parts, keys, sites, whole, tensors, vocabulary, [*grown])
        plan._check(checkpoint, delta_folder)
        return plan

    def with_tied(self, checkpoint: Checkpoint) -> MergePlan:
        """Return a plan that also changes the other names under which the checkpoint stores a tied tensor."""
        sites, whole = dict(self.sites), dict(self.whole)
        for key, found in self.sites.items():
            if found[0].grid.embedding:
                sites |= dict.fromkeys(tied_copies(key, checkpoint, {*sites, *whole}), found)
        for key, values in self.whole.items():
            whole |= dict.fromkeys(tied_copies(key, checkpoint, {*sites, *whole}), values)
        tensors = {key: checkpoint.tensors[key] for key in [*sites, *whole]}
        return replace(self, sites=sites, whole=whole, tensors=tensors)

    @property
    def other_dtypes(self) -> set[str]:
        """Dtypes of the checkpoint's weights with blocks, other than the dtype of training."""
        return {self.tensors[key].dtype for key in self.sites} - {self.delta.weight_dtype}

    @property
    def dtypes(self) -> dict[str, str]:
        """Module with blocks, or whole tensor of the delta -> dtype of the tensor in the checkpoint."""
        found = {site.name: self.tensors[key].dtype for key, sites in self.sites.items() for site in sites}
        return found | {name: self.tensors[key].dtype for name, key in self.keys.items()}

    @property
    def is_resized(self) -> bool:
        """Whether the delta has another vocabulary than the checkpoint."""
        return any(values.shape != self.tensors[key].shape for key, values in self.whole.items())

    def write(self, path: Path) -> None:
        """Write the trained values into a copy of one of the checkpoint's files.

        A tensor with a resized vocabulary does not fit into its place: then the file is rewritten, from memory.
        """
        resized = {}
        for key, stored in self.tensors.items():
            if stored.file != path.name:
                continue
            if key in self.whole and self.whole[key].shape != stored.shape:
                resized[key] = cast(self.whole[key], stored.dtype)
            elif key in self.whole:
                open_array(path, stored)[...] = cast(self.whole[key], stored.dtype)
            else:
                tensor = open_array(path, stored)
                for site in self.sites[key]:
                    site.put(tensor, cast(site.blocks, stored.dtype))
        if resized:
            _write_again(path, resized)

    def _check(self, checkpoint: Checkpoint, delta_folder: Path) -> None:
        delta, folder = self.delta, checkpoint.folder
        what = f"the delta in {delta_folder}"
        for key, sites in self.sites.items():
            stored = self.tensors[key]
            for site in sites:
                expected = site.grid.stored_shape
                expected = expected if site.expert is None else (*stored.shape[:1], *expected)
                _expect(what, key, stored, expected, FLOATS, folder)
        check_base(delta, folder.resolve().name, _differences(delta, checkpoint), delta_folder)
        for key, values in self.whole.items():
            stored, dtype = self.tensors[key], dtype_name(values)
            alike = next((kind for kind in (FLOATS, INTEGERS) if dtype in kind), (dtype,))
            is_resized = values.ndim > 0 and len(values) in self.vocabulary
            shape = stored.shape[:1] + values.shape[1:] if is_resized else values.shape
            _expect(what, key, stored, shape, alike, folder)


def _differences(delta: Delta, checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors of the delta's base that have other values in a checkpoint; warn if some cannot
    be compared."""
    fingerprint = delta.fingerprint
    if fingerprint.missing(checkpoint.loaded):
        look_up(checkpoint)
    found = differences(fingerprint, checkpoint)
    if missing := fingerprint.missing(checkpoint.loaded):
        logger.warning(
            "%d of the %d tensors of the delta's base, such as `%s`, were not compared: %s does not store them as they "
            "are loaded.",
            len(missing),
            len(fingerprint.checksums),
            missing[0],
            checkpoint.folder,
        )
    return found


def _write_again(path: Path, resized: dict[str, np.ndarray]) -> None:
    arrays, metadata = load_arrays(path, f"copy of the {BASE}")
    write_atomically(path, lambda temporary: save_arrays(arrays | resized, temporary, metadata))


def refuse_other_depth(delta_folder: Path, checkpoint: Checkpoint) -> None:
    """Raise `SMTError` if the model in training had another number of layers than the checkpoint."""
    layers = [config.get(LAYERS) for config in (load_config(delta_folder), checkpoint.config or {})]
    if None not in layers and layers[0] != layers[1]:
        raise SMTError(
            f"the delta was trained with {LAYERS}={layers[0]}, and {checkpoint.folder} has {layers[1]}. To "
            f"get the trained model, {IN_MEMORY}."
        )


def refuse_grown(plan: MergePlan, what: str) -> None:
    """Raise `SMTError` if a delta has rows of new tokens in blocks; `what` names what this prevents."""
    if plan.grown:
        raise SMTError(
            f"the delta has rows of new tokens in `{plan.grown[0]}`, which the base does not have, and cannot be "
            f"{what}. Merge it instead (smt merge), or load it with from_delta."
        )


def _expect(
    what: str, key: str, stored: StoredTensor, shape: tuple[int, ...], dtypes: Iterable[str], folder: Path
) -> None:
    if stored.shape != shape:
        raise SMTError(
            f"{what} expects `{key}` of {folder} to have shape {list(shape)}, got {list(stored.shape)}. Use the "
            "base that it was trained on."
        )
    if stored.dtype not in dtypes:
        raise SMTError(
            f"`{key}` of {folder} is stored as {stored.dtype} in {stored.size} bytes, which blocks cannot be written "
            "into. Use the unquantised base that it was trained on."
        )
