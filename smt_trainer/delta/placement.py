"""What a delta changes in the files of a checkpoint: check that it fits, and write it into copies of them.

Files are mapped into memory, so only the pages with trained values are read and written. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smt_trainer.arrays import INTEGERS, WEIGHTS, cast, dtype_name
from smt_trainer.delta.checks import check_base, warn_of_rounding
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.expert_files import find_experts
from smt_trainer.delta.folder import load_config
from smt_trainer.delta.onto import WAYS, check_onto, quantised_names
from smt_trainer.delta.parts import Part
from smt_trainer.delta.renamed import find_renamed
from smt_trainer.delta.site import Site
from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically
from smt_trainer.model.checkpoint import BASE, Checkpoint, parts_of
from smt_trainer.model.names import find_names, layer_index
from smt_trainer.settings import is_int
from smt_trainer.sparse.fingerprint import read_sample
from smt_trainer.tensor_file import load_arrays, open_array, save_arrays
from smt_trainer.tensor_header import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """A delta and where it goes.

    Attributes:
        delta: the trained values.
        parts: module with blocks -> where its weight lies in the checkpoint.
        keys: whole tensor of the delta -> its name in the checkpoint; without what is new in the model.
        sites: tensor name in the checkpoint -> the blocks that lie in it.
        whole: tensor name in the checkpoint -> the tensor that replaces it, with other rows if the vocabulary changed.
        places: tensor name -> where it lies, of all of these.
        vocabulary: sizes of the vocabulary in training.
        grown: those of `whole` that are made of the base's rows and blocks with all rows of new tokens.
    """

    delta: Delta
    parts: dict[str, list[Part]]
    keys: dict[str, str]
    sites: dict[str, list[Site]]
    whole: dict[str, np.ndarray]
    places: dict[str, Place]
    vocabulary: set[int]
    grown: list[str]

    @classmethod
    def of(cls, delta_folder: Path, checkpoint: Checkpoint, onto: str | None = None) -> Placement:
        """Read a delta and find its tensors in a checkpoint.

        Raises:
            SMTError: the delta is damaged, or belongs to another base; or its base was quantised, and `onto` is left
                open.
        """
        delta = Delta.load(delta_folder)
        check_onto(delta, onto, is_quantised=checkpoint.is_quantised)
        if checkpoint.is_quantised and quantised_names(delta):
            raise SMTError(f"the quantised weights of {checkpoint.folder} cannot hold the trained blocks. {WAYS}")
        placement = cls.at(delta, delta_folder, checkpoint)
        _refuse_missing([name for name in delta.whole_arrays if name not in placement.keys], checkpoint.folder)
        for dtype in placement.other_dtypes:
            logger.warning(
                "The delta was trained on %s and is merged into %s weights. The result is not exactly the trained "
                "model.",
                delta.weight_dtype,
                dtype,
            )
        if not placement.other_dtypes:
            warn_of_rounding(delta, placement.dtypes)
        whole, sites = placement.whole, placement.sites
        for key, (first, *_) in list(sites.items()):
            for copy in tied_copies(key, checkpoint, {*sites, *whole}) if first.grid.embedding else ():
                sites[copy], placement.places[copy] = sites[key], checkpoint.places[copy]
        for key, values in list(whole.items()):
            for copy in tied_copies(key, checkpoint, {*sites, *whole}):
                placement.whole[copy], placement.places[copy] = values, checkpoint.places[copy]
        return placement

    @classmethod
    def at(cls, delta: Delta, delta_folder: Path, checkpoint: Checkpoint) -> Placement:
        """Find the tensors of a delta in a checkpoint; a whole one that is new in the model is in none.

        Raises:
            SMTError: the checkpoint lacks a weight that has blocks, or the delta belongs to another base.
        """
        # Looking for the blocks also tells which tensors loading renames.
        parts = _find_parts(delta, checkpoint)
        keys, sites = _find_whole(delta, checkpoint), _sites(delta, parts, checkpoint)
        whole = {keys[name]: values for name, values in delta.whole_arrays.items() if name in keys}
        grown = _grown(delta, sites, checkpoint)
        sites = {key: found for key, found in sites.items() if key not in grown}
        used = [(key, site.expert) for key, found in sites.items() for site in found]
        if len(whole) < len(keys) or len(set(used)) < len(used) or whole.keys() & sites.keys():
            raise SMTError(f"two names in the delta stand for one tensor of {checkpoint.folder}. The delta is damaged.")
        whole |= grown
        places = {key: checkpoint.places[key] for key in [*sites, *whole]}
        vocabulary = vocabulary_sizes(load_config(delta_folder))
        placement = cls(delta, parts, keys, sites, whole, places, vocabulary, [*grown])
        placement._check(checkpoint)
        return placement

    @property
    def other_dtypes(self) -> set[str]:
        """Dtypes of the checkpoint's weights with blocks, other than that of training."""
        return {self.places[key].dtype for key in self.sites} - {self.delta.weight_dtype}

    @property
    def dtypes(self) -> dict[str, str]:
        """Module with blocks, or whole tensor of the delta -> dtype of the tensor in the checkpoint."""
        found = {site.name: self.places[key].dtype for key, sites in self.sites.items() for site in sites}
        return found | {name: self.places[key].dtype for name, key in self.keys.items()}

    @property
    def is_resized(self) -> bool:
        """Whether the delta has another vocabulary than the checkpoint."""
        return any(values.shape != self.places[key].shape for key, values in self.whole.items())

    def write(self, path: Path) -> None:
        """Write the trained values into a copy of one of the checkpoint's files.

        A tensor over a resized vocabulary does not fit into its place: then the file is written again, from memory.
        """
        resized = {}
        for key, place in self.places.items():
            if place.file != path.name:
                continue
            if key in self.whole and self.whole[key].shape != place.shape:
                resized[key] = cast(self.whole[key], place.dtype)
            elif key in self.whole:
                open_array(path, place)[...] = cast(self.whole[key], place.dtype)
            else:
                tensor = open_array(path, place)
                for site in self.sites[key]:
                    site.put(tensor, cast(site.blocks, place.dtype))
        if resized:
            _write_again(path, resized)

    def _check(self, checkpoint: Checkpoint) -> None:
        delta, folder = self.delta, checkpoint.folder
        for key, sites in self.sites.items():
            place = self.places[key]
            for site in sites:
                expected = site.grid.stored_shape
                _expect(key, place, expected if site.expert is None else (*place.shape[:1], *expected), WEIGHTS, folder)
        places = checkpoint.places | {name: checkpoint.places[key] for name, key in checkpoint.renamed.items()}
        differences = delta.base.differences(
            places, lambda key, stride, rows: read_sample(folder, places[key], stride, rows)
        )
        check_base(delta, folder.resolve().name, differences)
        for key, values in self.whole.items():
            place, dtype = self.places[key], dtype_name(values)
            alike = next((kind for kind in (WEIGHTS, INTEGERS) if dtype in kind), (dtype,))
            is_resized = values.ndim > 0 and len(values) in self.vocabulary
            _expect(key, place, place.shape[:1] + values.shape[1:] if is_resized else values.shape, alike, folder)


def _find_whole(delta: Delta, checkpoint: Checkpoint) -> dict[str, str]:
    names = {key: key for key in checkpoint.places} | checkpoint.renamed
    return {name: names[other] for name, other in find_names(delta.whole_arrays, names).items()}


def _sites(delta: Delta, parts: Mapping[str, list[Part]], checkpoint: Checkpoint) -> dict[str, list[Site]]:
    """Return the blocks of a delta by the names of the tensors in a checkpoint that they lie in."""
    selection, sites = delta.selection, {}
    for name, found in parts.items():
        grid, indices = selection.grids[name], selection.block_indices[name]
        whole = Site(name, grid, indices, delta.block_arrays[name], found[0].expert)
        for part in found:
            rows = checkpoint.places[part.key].shape[0]
            site = whole if len(found) == 1 else whole.rows(part.first_row, rows)
            if len(site.blocks):
                sites.setdefault(part.key, []).append(site)
    return sites


def _grown(delta: Delta, sites: Mapping[str, list[Site]], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return the tensors with blocks that have fewer rows in a checkpoint, in full, where blocks hold the others."""
    found = {}
    for key, (site, *_) in sites.items():
        place = checkpoint.places[key]
        before, *others = place.shape
        # A part of a weight that the checkpoint stores in parts has fewer rows than the weight, and lacks none.
        if site.expert is not None or before >= site.grid.stored_shape[0]:
            continue
        rows = delta.selection.new_rows(site.name, before)
        if rows and tuple(others) == site.grid.stored_shape[1:] and place.dtype in WEIGHTS:
            base = checkpoint.array(place)
            found[key] = np.concatenate([base, np.zeros((len(rows), *others), base.dtype)])
            site.put(found[key], cast(site.blocks, place.dtype))
    return found


def _find_parts(delta: Delta, checkpoint: Checkpoint) -> dict[str, list[Part]]:
    """Return where the weights with blocks lie in a checkpoint, by the names of their modules."""
    keys = find_names([f"{name}.weight" for name in delta.block_arrays], checkpoint.places)
    parts = {name: [Part(keys[f"{name}.weight"])] for name in delta.block_arrays if f"{name}.weight" in keys}
    others = [name for name in delta.block_arrays if name not in parts]
    experts = [name for name in others if name.rpartition(".")[2].isdecimal()]
    if experts:
        parts |= find_experts(experts, checkpoint)
    missing = [name for name in others if name not in parts]
    if missing:
        parts |= find_renamed(missing, checkpoint)
    _refuse_missing([f"{name}.weight" for name in others if name not in parts], checkpoint.folder)
    return parts


def _write_again(path: Path, resized: dict[str, np.ndarray]) -> None:
    arrays, metadata = load_arrays(path, f"copy of the {BASE}")
    write_atomically(path, lambda temporary: save_arrays(arrays | resized, temporary, metadata))


def vocabulary_sizes(config: dict[str, Any]) -> set[int]:
    """Return the sizes of the vocabulary in a configuration and its parts."""
    return {part["vocab_size"] for part in parts_of(config) if is_int(part.get("vocab_size"))}


def refuse_grown(placement: Placement, what: str) -> None:
    """Raise `SMTError` if a delta has rows of new tokens in blocks, which cannot be used in some way."""
    if placement.grown:
        raise SMTError(
            f"the delta has rows of new tokens in `{placement.grown[0]}`, which the base has not, and cannot be "
            f"{what}. Merge it instead (smt merge), or load it with from_delta."
        )


def tied_copies(key: str, checkpoint: Checkpoint, taken: set[str]) -> list[str]:
    """Return the other names under which a checkpoint stores a tensor that is tied to itself.

    transformers ties input and output embeddings that are stored twice if the configuration says so and the values
    agree. `BertLMPredictionHead` does so with a bias. A configuration that says nothing leaves it to the values.
    """
    place = checkpoint.places[key]
    if not may_tie(checkpoint.config or {}):
        return []
    return [
        name
        for name, other in checkpoint.places.items()
        if name not in taken
        and (other.dtype, other.shape) == (place.dtype, place.shape)
        and _can_be_tied(key, name, len(place.shape))
        and checkpoint.are_equal(key, name)
    ]


def _can_be_tied(key: str, other: str, dimensions: int) -> bool:
    if dimensions == 2:
        return layer_index(key) == layer_index(other) == -1
    first, second = sorted((key, other), key=len)
    return second == f"{first.removesuffix('bias')}decoder.bias"


def may_tie(config: dict[str, Any]) -> bool:
    """Return whether a configuration leaves it open, or says, that input and output embeddings are tied."""
    said = [part["tie_word_embeddings"] for part in parts_of(config) if "tie_word_embeddings" in part]
    return not said or any(said)


def _refuse_missing(names: list[str], folder: Path) -> None:
    if names:
        raise SMTError(
            f"{folder} has no tensor `{names[0]}`. If its architecture renames tensors on loading, or the delta has "
            "a new head, merge in memory instead: from_delta(delta, auto_class, base=...).save_pretrained(output)."
        )


def _expect(key: str, place: Place, shape: tuple[int, ...], dtypes: Iterable[str], folder: Path) -> None:
    if place.shape != shape:
        raise SMTError(
            f"the delta expects `{key}` of {folder} to have shape {list(shape)}, got {list(place.shape)}. Use the base "
            "that it was trained on."
        )
    if place.dtype not in dtypes:
        raise SMTError(
            f"`{key}` of {folder} is stored as {place.dtype} in {place.size} bytes, which blocks cannot be written "
            "into. Use the base as it was trained on, unquantised."
        )
