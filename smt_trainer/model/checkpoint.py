"""A checkpoint on disk: which files hold its weights, and where in them each tensor lies. Imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smt_trainer.errors import SMTError
from smt_trainer.files import load_json
from smt_trainer.model.hub import fetch, is_folder
from smt_trainer.tensor_file import open_array
from smt_trainer.tensor_header import Place, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG = "config.json"
# What its files are called in messages.
BASE = "base"
# The key of config.json that names the file of the weights.
EXPLICIT = "transformers_weights"
# What is fetched from the hub before the weights.
BESIDE_WEIGHTS = "*.json *.txt *.model *.bpe *.codes *.jinja *.py".split()
CHUNK = 2**22


def parts_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and those in it, such as that of a language model in one that also sees."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder, as transformers finds them.

    Attributes:
        folder: where it lies.
        index: name of the file that lists the shards; None for a checkpoint in one file.
        places: tensor name -> where it lies.
        config: content of its config.json; None without one.
        renamed: name that loading gives to a tensor -> its name here; filled where it is looked for.
    """

    folder: Path
    index: str | None
    places: dict[str, Place]
    config: dict[str, Any] | None
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Names of the files that hold the weights."""
        return sorted({place.file for place in self.places.values()})

    @property
    def is_quantised(self) -> bool:
        """Whether its configuration says that weights are quantised."""
        return "quantization_config" in (self.config or {})

    def array(self, place: Place) -> np.ndarray:
        """Return a tensor of one of its files, read-only; the file stays mapped."""
        return open_array(self.folder / place.file, place, writable=False)

    @classmethod
    def open(cls, folder: Path, what: str = BASE) -> Checkpoint:
        """Read a folder's configuration, index and headers.

        Args:
            folder: the checkpoint.
            what: what it should be, for messages.

        Raises:
            SMTError: one of them is damaged, a shard is missing or not a plain file name, a tensor is stored twice, or
                the folder holds no weights in safetensors format.
        """
        config = load_json(folder / CONFIG, f"configuration of the {what}") if (folder / CONFIG).is_file() else None
        if config is not None and not isinstance(config, dict):
            raise SMTError(
                f"{folder / CONFIG} should hold an object, got a {type(config).__name__}. Download it again."
            )
        name = _weights_file(folder, config or {}, what)
        if not name.endswith(".json"):
            return cls(folder, None, read_header(folder / name, what)[0], config)
        shard_of = _read_index(folder / name, what)
        places: dict[str, Place] = {}
        for shard in sorted(set(shard_of.values())):
            found, _ = read_header(folder / shard, what)
            if both := sorted(found.keys() & places.keys()):
                raise SMTError(f"{folder} stores `{both[0]}` twice, in {places[both[0]].file} and {shard}. Repair it.")
            places |= found
        if missing := [key for key in shard_of if key not in places or places[key].file != shard_of[key]]:
            raise SMTError(
                f"{folder / name} places `{missing[0]}` in {shard_of[missing[0]]}, which lacks it. Repair it."
            )
        return cls(folder, name, places, config)

    def are_equal(self, *keys: str) -> bool:
        """Return whether two tensors of one size have the same bytes."""
        with contextlib.ExitStack() as stack:
            files = []
            for place in (self.places[key] for key in keys):
                files.append(stack.enter_context(open(self.folder / place.file, "rb")))
                files[-1].seek(place.start)
            size = self.places[keys[0]].size
            lengths = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
            return all(len({file.read(length) for file in files}) == 1 for length in lengths)


def find_checkpoint(base: str | Path, revision: str | None, what: str = BASE) -> Path:
    """Return the folder of a base, or `what` it should be: itself, or its download from the hub, of whose weights only
    those are fetched that transformers would read. Raise `SMTError` if there is none."""
    if is_folder(base, revision):
        return Path(base)
    folder = fetch(what, base, revision, BESIDE_WEIGHTS)
    config = load_json(folder / CONFIG, f"configuration of the {what}") if (folder / CONFIG).is_file() else {}
    explicit = config.get(EXPLICIT) if isinstance(config, dict) else None
    # The folder is called as the commit, so all is of one.
    fetch(what, base, folder.name, [str(explicit or SINGLE_FILE), INDEX_FILE])
    name = _weights_file(folder, {EXPLICIT: explicit}, what)
    if name.endswith(".json"):
        fetch(what, base, folder.name, sorted(set(_read_index(folder / name, what).values())))
    return folder


def _weights_file(folder: Path, config: dict[str, Any], what: str) -> str:
    """Return the name of the file that transformers reads first: a file with all weights before an index of shards."""
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        _check_plain(explicit, folder / CONFIG)
        return explicit
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return name
    raise SMTError(
        f"{folder} should hold {SINGLE_FILE} or {INDEX_FILE}, but has neither. Convert the {what} to safetensors first "
        "(from_pretrained, then save_pretrained)."
    )


def _read_index(path: Path, what: str) -> dict[str, str]:
    """Return tensor name -> file name."""
    index = load_json(path, f"index of the {what}")
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise SMTError(f"{path} should have a `weight_map` from tensors to files, and has none. Download it again.")
    for name in set(map(str, shard_of.values())):
        _check_plain(name, path)
    return {str(key): str(name) for key, name in shard_of.items()}


def _check_plain(name: Any, where: Path) -> None:
    """Raise `SMTError` unless a name from a file is plain, so that nothing outside its folder is read or written."""
    plain = isinstance(name, str) and name == Path(name).name and not name.startswith(".") and "\\" not in name
    if not plain or not name.isprintable() or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise SMTError(
            f"{where} names {str(name)[:200]!r} as a file of weights. Expected the plain name of a .safetensors file "
            "in the same folder. Do not use this checkpoint unless you know why."
        )
