"""Read a checkpoint on disk: which files hold its weights, and where in them each tensor lies. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smt_trainer.errors import SMTError
from smt_trainer.json_files import load_json
from smt_trainer.model.hub import fetch, is_folder
from smt_trainer.settings import is_int
from smt_trainer.tensor_file import open_array
from smt_trainer.tensor_header import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
# Of sentence-transformers.
MODULES_FILE = "modules.json"
# What messages call a checkpoint, unless told otherwise.
BASE = "base"
# The key of config.json that names the file of the weights.
WEIGHTS_KEY = "transformers_weights"
# What is fetched from the hub before the weights.
BESIDE_WEIGHTS = "*.json *.txt *.model *.bpe *.codes *.spm *.jinja *.py".split()
CHUNK = 2**22


def parts_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and those nested in it, such as the language model's in a vision-language model's."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def vocabulary_sizes(config: dict[str, Any]) -> set[int]:
    """Return the sizes of the vocabulary in a configuration and its parts."""
    return {part["vocab_size"] for part in parts_of(config) if is_int(part.get("vocab_size"))}


@dataclass
class Conversions:
    """What loading makes of the tensors of a checkpoint (`conversion.py`).

    Attributes:
        renamed: name in the model -> the tensor.
        fused: name in the model -> the tensor that holds it among others, the first of its rows and their number.
        stacked: name of a 3-D parameter of experts -> the tensors of each expert, from the first row on.
        changed: name in the model of a tensor with other values than in the files -> what loading does to it.
        are_known: whether the others have been filled.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    stacked: dict[str, list[list[str]]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    are_known: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder, as transformers finds them.

    Attributes:
        folder: where it lies.
        index: name of the file that lists the shards; None for a checkpoint in one file.
        tensors: tensor name -> where it lies.
        config: content of its config.json; None without one.
        conversions: what loading makes of the tensors, where that was looked up.
    """

    folder: Path
    index: str | None
    tensors: dict[str, StoredTensor]
    config: dict[str, Any] | None
    conversions: Conversions = field(default_factory=Conversions)

    @property
    def names(self) -> dict[str, str]:
        """Name that loading is known to give to a tensor, or its own -> the tensor's."""
        renamed = self.conversions.renamed
        moved = set(renamed.values())
        return {key: key for key in self.tensors if key not in moved} | renamed

    @property
    def loaded(self) -> dict[str, list[StoredTensor]]:
        """Tensor name -> where it lies, or the parts that it consists of, one after another; also under the names that
        loading is known to give. Without tensors that loading is known to change."""
        known = self.conversions
        found = {name: [self.tensors[key]] for name, key in self.names.items()}
        found |= {name: [self.tensors[key].rows(first, count)] for name, (key, first, count) in known.fused.items()}
        for name, experts in known.stacked.items():
            found[name] = [self.tensors[key] for keys in experts for key in keys]
        return {name: parts for name, parts in found.items() if name not in known.changed}

    @property
    def files(self) -> list[str]:
        """Names of the files that hold the weights."""
        return sorted({stored.file for stored in self.tensors.values()})

    @property
    def is_quantised(self) -> bool:
        """Whether the configuration says that the weights are quantised."""
        return (self.config or {}).get("quantization_config") is not None

    def array(self, stored: StoredTensor) -> np.ndarray:
        """Return a tensor of one of its files, read-only; the file stays mapped."""
        return open_array(self.folder / stored.file, stored, writable=False)

    @classmethod
    def open(cls, folder: Path, what: str = BASE) -> Checkpoint:
        """Read a folder's configuration, index and headers.

        Args:
            folder: the checkpoint.
            what: what it should be, for messages.

        Raises:
            SMTError: a file is damaged, a shard is missing or not a plain file name, a tensor is stored twice, or the
                folder holds no weights in safetensors format.
        """
        path = folder / CONFIG_FILE
        config = load_json(path, f"configuration of the {what}") if path.is_file() else None
        if config is not None and not isinstance(config, dict):
            raise SMTError(f"{path} should hold an object, got a {type(config).__name__}. Download it again.")
        name = _weights_file(folder, config or {}, what)
        if not name.endswith(".json"):
            return cls(folder, None, read_header(folder / name, what)[0], config)
        shard_of = _read_index(folder / name, what)
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(shard_of.values())):
            found, _ = read_header(folder / shard, what)
            if both := sorted(found.keys() & tensors.keys()):
                raise SMTError(f"{folder} stores `{both[0]}` twice, in {tensors[both[0]].file} and {shard}. Repair it.")
            tensors |= found
        if missing := [key for key in shard_of if key not in tensors or tensors[key].file != shard_of[key]]:
            raise SMTError(
                f"{folder / name} places `{missing[0]}` in {shard_of[missing[0]]}, which lacks it. Repair it."
            )
        return cls(folder, name, tensors, config)

    def are_equal(self, *keys: str) -> bool:
        """Return whether tensors of equal size have the same bytes."""
        with contextlib.ExitStack() as stack:
            files = []
            for stored in (self.tensors[key] for key in keys):
                files.append(stack.enter_context(open(self.folder / stored.file, "rb")))
                files[-1].seek(stored.start)
            size = self.tensors[keys[0]].size
            lengths = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
            return all(len({file.read(length) for file in files}) == 1 for length in lengths)


def find_checkpoint(base: str | Path, revision: str | None, what: str = BASE) -> Path:
    """Return the folder of a base (or `what` it should be): itself if local, else its download from the hub. Of the
    weights, download only those that transformers would read. Raise `SMTError` if there is none."""
    if is_folder(base, revision):
        return Path(base)
    folder = fetch(what, base, revision, BESIDE_WEIGHTS)
    path = folder / CONFIG_FILE
    config = load_json(path, f"configuration of the {what}") if path.is_file() else {}
    explicit = config.get(WEIGHTS_KEY) if isinstance(config, dict) else None
    # The folder is named after the commit, so all files come from the same one.
    fetch(what, base, folder.name, [str(explicit or SINGLE_FILE), INDEX_FILE])
    name = _weights_file(folder, {WEIGHTS_KEY: explicit}, what)
    more = [f"{part}/*" for part in further_modules(folder)]
    if name.endswith(".json"):
        more += sorted(set(_read_index(folder / name, what).values()))
    if more:
        fetch(what, base, folder.name, more)
    return folder


def further_modules(folder: Path) -> list[str]:
    """Return the folders of the modules that sentence-transformers puts behind the model, with weights of their own."""
    path = folder / MODULES_FILE
    listed = load_json(path, "list of modules") if path.is_file() else []
    names = [part.get("path") for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)]


def _weights_file(folder: Path, config: dict[str, Any], what: str) -> str:
    """Return the file that transformers reads: the one in config.json, else all weights in one file, else an index."""
    explicit = config.get(WEIGHTS_KEY)
    if explicit is not None:
        _check_plain(explicit, folder / CONFIG_FILE)
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
    """Raise `SMTError` unless a name read from a file is a plain one, so that all files lie in the same folder."""
    plain = isinstance(name, str) and name == Path(name).name and not name.startswith(".") and "\\" not in name
    if not plain or not name.isprintable() or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise SMTError(
            f"{where} names {str(name)[:200]!r} as a file of weights. Expected the plain name of a .safetensors file "
            "in the same folder. Do not use this checkpoint unless you know why."
        )
