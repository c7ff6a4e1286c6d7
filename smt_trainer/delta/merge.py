"""Merge a delta into a checkpoint on disk, shard by shard. Memory holds one shard at a time and no model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from smt_trainer.delta.delta import Delta, check_base
from smt_trainer.errors import SMTError
from smt_trainer.files import load_json, new_folder, open_tensors

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def merge_checkpoint(
    base: str | Path, delta_folder: str | Path, output: str | Path, *, revision: str | None = None
) -> Path:
    """Write base plus delta as a plain checkpoint, with the sharding, metadata, dtype and other files of the base.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        delta_folder: a delta folder.
        output: folder to make; it appears whole or not at all.
        revision: revision of a base on the hub.

    Returns:
        The output folder.

    Raises:
        SMTError: the output exists and is not empty, the delta is damaged or belongs to another base, or the base is
            not a safetensors checkpoint. Nothing is written.
    """
    with new_folder(Path(output)) as stage:
        _merge_into(stage, base, delta_folder, revision)
    return Path(output)


def _merge_into(stage: Path, base: str | Path, delta_folder: str | Path, revision: str | None) -> None:
    delta = Delta.load(delta_folder)
    folder = _find_checkpoint(base, revision)
    shard_of = _shards(folder)
    keys = {name: _find_key(f"{name}.weight", shard_of, base) for name in delta.selection.block_indices}
    whole = {_find_key(name, shard_of, base): tensor for name, tensor in delta.whole.items()}
    _check_weights(delta, folder, shard_of, keys, whole)

    modules = {key: name for name, key in keys.items()}
    for shard in tqdm(sorted(set(shard_of.values())), desc="Merging", unit="shard"):
        _merge_shard(folder / shard, stage / shard, delta, modules, whole)
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not path.name.startswith("."):
            shutil.copyfile(path, stage / path.name)


def _find_checkpoint(base: str | Path, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(base), revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        raise SMTError(
            f"{base} is not a folder and could not be fetched from the hub ({error}). Give the folder of the base "
            "checkpoint, or connect and give its hub name."
        ) from error


def _shards(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name, for a checkpoint in one or several safetensors files."""
    if (folder / INDEX_FILE).is_file():
        return load_json(folder / INDEX_FILE, "index of the base")["weight_map"]
    if (folder / SINGLE_FILE).is_file():
        with open_tensors(folder / SINGLE_FILE, "base") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    raise SMTError(
        f"{folder} should hold {SINGLE_FILE} or {INDEX_FILE}, but has neither. Convert the base to safetensors first "
        "(from_pretrained, then save_pretrained)."
    )


def _find_key(name: str, shard_of: dict[str, str], base: str | Path) -> str:
    """Return a tensor's name in the checkpoint, which may lack or add the prefix of the base model (`model.`)."""
    if name in shard_of:
        return name
    similar = [key for key in shard_of if key.endswith("." + name) or name.endswith("." + key)]
    if len(similar) == 1:
        return similar[0]
    raise SMTError(
        f"{base} has no tensor `{name}`. If its architecture renames tensors on loading, or the delta has a new head, "
        "merge in memory instead: from_delta(delta, auto_class, base=...).save_pretrained(output)."
    )


def _check_weights(
    delta: Delta, folder: Path, shard_of: dict[str, str], keys: dict[str, str], whole: dict[str, Tensor]
) -> None:
    dtypes = set()
    for name, key in keys.items():
        weight, expected = _read(folder / shard_of[key], key), delta.selection.grids[name].stored_shape
        if tuple(weight.shape) != expected:
            raise SMTError(
                f"the delta expects `{key}` of {folder} to have shape {list(expected)}, got {list(weight.shape)}. Use "
                "the base that it was trained on."
            )
        dtypes.add(weight.dtype)
    differences = delta.base.differences(shard_of, lambda key: _read(folder / shard_of[key], key))
    check_base(delta, folder.resolve().name if folder.is_dir() else None, differences)
    for key, tensor in whole.items():
        if _read(folder / shard_of[key], key).shape != tensor.shape:
            raise SMTError(
                f"the delta expects `{key}` of {folder} to have shape {list(tensor.shape)}, got another. Use the base "
                "that it was trained on."
            )
    for dtype in dtypes - {delta.weight_dtype}:
        logger.warning(
            "The delta was trained on %s and is merged into %s weights. The result is not exactly the trained model.",
            delta.weight_dtype,
            dtype,
        )


def _read(path: Path, key: str) -> Tensor:
    with open_tensors(path, "base") as file:
        return file.get_tensor(key)


def _merge_shard(
    source: Path, destination: Path, delta: Delta, modules: dict[str, str], whole: dict[str, Tensor]
) -> None:
    with open_tensors(source, "base") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    for key, tensor in tensors.items():
        if key in modules:
            name = modules[key]
            delta.selection.grids[name].scatter_(tensor, delta.selection.block_indices[name], delta.blocks[name])
        elif key in whole:
            tensor.copy_(whole[key])
    save_file(tensors, destination, metadata=metadata)
