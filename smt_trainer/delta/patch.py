"""What a delta changes in the files of a checkpoint: check that it fits, and write it into copies of them.

Files are mapped into memory, so only the pages with trained values are read and written.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smt_trainer.delta.checks import WEIGHT_DTYPES
from smt_trainer.delta.delta import Delta, check_base, load_config
from smt_trainer.errors import SMTError
from smt_trainer.files import open_tensors, write_atomically
from smt_trainer.model.checkpoint import Checkpoint, Place, numel
from smt_trainer.model.names import layer_index
from smt_trainer.settings import is_int

logger = logging.getLogger(__name__)

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Patch:
    """A delta and where it goes.

    Attributes:
        delta: the trained values.
        modules: tensor name in the checkpoint -> module whose blocks it holds.
        whole: tensor name in the checkpoint -> the tensor that replaces it, with other rows if the vocabulary changed.
        places: tensor name -> where it lies, of all of these.
        vocabulary: sizes of the vocabulary in training.
    """

    delta: Delta
    modules: dict[str, str]
    whole: dict[str, Tensor]
    places: dict[str, Place]
    vocabulary: set[int]

    @classmethod
    def of(cls, delta_folder: Path, checkpoint: Checkpoint) -> Patch:
        """Read a delta and find its tensors in a checkpoint.

        Raises:
            SMTError: the delta is damaged, or belongs to another base.
        """
        delta = Delta.load(delta_folder)
        modules = {_find_key(f"{name}.weight", checkpoint): name for name in delta.selection.block_indices}
        whole = {_find_key(name, checkpoint): tensor for name, tensor in delta.whole.items()}
        if len({**modules, **whole}) < len(delta.selection.block_indices) + len(delta.whole):
            raise SMTError(f"two names in the delta stand for one tensor of {checkpoint.folder}. The delta is damaged.")
        places = {key: checkpoint.places[key] for key in [*modules, *whole]}
        patch = cls(delta, modules, whole, places, _vocabulary(load_config(delta_folder)))
        patch._check(checkpoint)
        for key, tensor in list(whole.items()):
            for copy in tied_copies(key, checkpoint, {*modules, *whole}):
                patch.whole[copy], patch.places[copy] = tensor, checkpoint.places[copy]
        return patch

    @property
    def is_resized(self) -> bool:
        """Whether the delta has another vocabulary than the checkpoint."""
        return any(tuple(tensor.shape) != self.places[key].shape for key, tensor in self.whole.items())

    def write(self, path: Path) -> None:
        """Write the trained values into a copy of one of the checkpoint's files.

        A tensor over a resized vocabulary does not fit into its place: then the file is written again, from memory.
        """
        resized = {}
        for key, place in self.places.items():
            if place.file != path.name:
                continue
            if key in self.whole and tuple(self.whole[key].shape) != place.shape:
                resized[key] = self.whole[key].to(DTYPES[place.dtype])
                continue
            with _Mapped(path, place) as tensor:
                if key in self.modules:
                    name = self.modules[key]
                    grid, indices = self.delta.selection.grids[name], self.delta.selection.block_indices[name]
                    grid.scatter_(tensor, indices, self.delta.blocks[name])
                else:
                    tensor.copy_(self.whole[key])
        if resized:
            _write_again(path, resized)

    def _check(self, checkpoint: Checkpoint) -> None:
        delta, folder = self.delta, checkpoint.folder
        for key, name in self.modules.items():
            expected, place = delta.selection.grids[name].stored_shape, self.places[key]
            _expect(key, place, expected, set(WEIGHT_DTYPES.values()), folder)
        differences = delta.base.differences(checkpoint.places, lambda key: read(folder, checkpoint.places[key]))
        check_base(delta, folder.resolve().name, differences)
        for key, tensor in self.whole.items():
            alike = {dtype for dtype in DTYPES.values() if dtype.is_floating_point == tensor.is_floating_point()}
            place = self.places[key]
            rows = place.shape[:1] if len(tensor) in self.vocabulary else tensor.shape[:1]
            _expect(key, place, (*rows, *tensor.shape[1:]), alike, folder)
        for dtype in {DTYPES[self.places[key].dtype] for key in self.modules} - {delta.weight_dtype}:
            logger.warning(
                "The delta was trained on %s and is merged into %s weights. The result is not exactly the trained "
                "model.",
                delta.weight_dtype,
                dtype,
            )


def _write_again(path: Path, resized: dict[str, Tensor]) -> None:
    with open_tensors(path, "copy of the base") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()} | resized  # noqa: SIM118 (not a dict)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _vocabulary(config: dict[str, Any]) -> set[int]:
    """Return the sizes of the vocabulary in a configuration and its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return {part["vocab_size"] for part in parts if is_int(part.get("vocab_size"))}


def read(folder: Path, place: Place) -> Tensor:
    """Return a tensor of a checkpoint; its pages are read when they are used."""
    with open(folder / place.file, "rb") as file:
        # A private mapping: torch warns of memory that it may not write.
        return _tensor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), place)


def tied_copies(key: str, checkpoint: Checkpoint, taken: set[str]) -> list[str]:
    """Return the other names under which a checkpoint stores a tensor that is tied to itself.

    transformers ties input and output embeddings that are stored twice if the configuration says so and the values
    agree. `BertLMPredictionHead` does so with a bias. A configuration that says nothing leaves it to the values.
    """
    place = checkpoint.places[key]
    if not _may_tie(checkpoint.config or {}):
        return []
    return [
        name
        for name, other in checkpoint.places.items()
        if name not in taken
        and (other.dtype, other.shape) == (place.dtype, place.shape)
        and _can_be_tied(key, name, len(place.shape))
        and torch.equal(_bits(checkpoint.folder, place), _bits(checkpoint.folder, other))
    ]


def _can_be_tied(key: str, other: str, dimensions: int) -> bool:
    if dimensions == 2:
        return layer_index(key) == layer_index(other) == -1
    first, second = sorted((key, other), key=len)
    return second == f"{first.removesuffix('bias')}decoder.bias"


def _may_tie(config: dict[str, Any]) -> bool:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return not said or any(said)


def _bits(folder: Path, place: Place) -> Tensor:
    return read(folder, place).view(-1).view(torch.uint8)


def _find_key(name: str, checkpoint: Checkpoint) -> str:
    """Return a tensor's name in the checkpoint, which may lack or add the prefix of the base model (`model.`)."""
    if name in checkpoint.places:
        return name
    similar = [key for key in checkpoint.places if key.endswith("." + name) or name.endswith("." + key)]
    if len(similar) == 1:
        return similar[0]
    raise SMTError(
        f"{checkpoint.folder} has no tensor `{name}`. If its architecture renames tensors on loading, or the delta has "
        "a new head, merge in memory instead: from_delta(delta, auto_class, base=...).save_pretrained(output)."
    )


def _expect(key: str, place: Place, shape: tuple[int, ...], dtypes: set[torch.dtype], folder: Path) -> None:
    if place.shape != shape:
        raise SMTError(
            f"the delta expects `{key}` of {folder} to have shape {list(shape)}, got {list(place.shape)}. Use the base "
            "that it was trained on."
        )
    dtype = DTYPES.get(place.dtype)
    if dtype not in dtypes or numel(place) * dtype.itemsize != place.size:
        raise SMTError(
            f"`{key}` of {folder} is stored as {place.dtype} in {place.size} bytes, which blocks cannot be written "
            "into. Use the base as it was trained on, unquantised."
        )


class _Mapped:
    """A tensor of a file, which writing to changes."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self.place = path, place

    def __enter__(self) -> Tensor:
        with open(self.path, "r+b") as file:
            self.buffer = mmap.mmap(file.fileno(), 0)
        self.tensor = _tensor(self.buffer, self.place)
        return self.tensor

    def __exit__(self, *exception) -> None:
        start, end = self.place.start, self.place.start + self.place.size
        if not _is_aligned(self.place):
            self.buffer[start:end] = self.tensor.view(-1).view(torch.uint8).numpy().tobytes()
        del self.tensor


def _is_aligned(place: Place) -> bool:
    return place.start % DTYPES[place.dtype].itemsize == 0


def _tensor(buffer: mmap.mmap, place: Place) -> Tensor:
    """Return a tensor on mapped memory, or a copy if its place suits no load of its dtype."""
    dtype, count = DTYPES[place.dtype], numel(place)
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    if not _is_aligned(place):
        return torch.frombuffer(bytearray(buffer[place.start : place.start + place.size]), dtype=dtype).view(
            place.shape
        )
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=place.start).view(place.shape)
