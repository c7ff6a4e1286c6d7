"""The delta: a folder with the trained blocks, their positions and what they were trained on.

    smt_delta.safetensors   <module>.blocks         [n, br, bc]  trained values (not differences, so merging is exact)
                            <module>.block_indices  [n, 2] int32 (row, column) in the module's grid
                            <parameter>             whole tensors of `modules_to_save`
    smt_config.json         format, configuration, grids, name and fingerprint of the base, dtype of its weights

Both are plain data: nothing is unpickled. Files are written atomically, the tensors last.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smt_trainer.convert import (
    convert_to_smt,
    find_linears,
    find_modules_to_save,
    fingerprint,
    get_state,
    is_smt_model,
    merge_and_unload,
    whole_parameters,
)
from smt_trainer.errors import SMTError
from smt_trainer.files import open_tensors, read_json, write_atomically, write_text
from smt_trainer.layers import SMTLinear, smt_layers, write_back
from smt_trainer.selection import BlockSelection, base_name

logger = logging.getLogger(__name__)

DELTA_FILE = "smt_delta.safetensors"
CONFIG_FILE = "smt_config.json"
FORMAT = "1"


@dataclass(frozen=True)
class Delta:
    """A delta in memory, checked.

    Attributes:
        selection: which blocks, of which model, chosen how.
        blocks: module name -> trained values [n, br, bc], row by row like `selection.block_indices`.
        whole: parameter name -> tensor, of the modules trained whole.
        fingerprint: checksum of the base values of the blocks (see `convert.fingerprint`).
        weight_dtype: dtype of the base weights in training; merging into it is exact.
    """

    selection: BlockSelection
    blocks: dict[str, Tensor]
    whole: dict[str, Tensor]
    fingerprint: str
    weight_dtype: torch.dtype

    @classmethod
    def read(cls, folder: str | Path) -> Delta:
        """Read and check a delta folder. Raises `SMTError` when a part is missing, damaged or out of range."""
        folder = Path(folder)
        manifest = read_json(folder / CONFIG_FILE, "delta configuration")
        tensors = _read_tensors(folder / DELTA_FILE)
        try:
            if manifest["format"] != FORMAT:
                raise SMTError(
                    f"the delta in {folder} has format {manifest['format']}, this version of smt_trainer reads "
                    f"{FORMAT}; install the version that wrote it."
                )
            blocks, described = {}, manifest["selection"]
            for name, module in described["modules"].items():
                indices = tensors.pop(f"{name}.block_indices", torch.empty(0, 2, dtype=torch.int32)).long()
                order = torch.argsort(indices[:, 0] * (1 + indices[:, 1].max()) + indices[:, 1]) if len(indices) else []
                module["block_indices"] = indices[order].tolist()
                if len(indices):
                    blocks[name] = tensors.pop(f"{name}.blocks")[order]
            selection = BlockSelection.from_dict(described)
            dtype = getattr(torch, manifest["weight_dtype"])
            expected_whole, base_fingerprint = manifest["whole"], manifest["fingerprint"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SMTError(
                f"the delta in {folder} is damaged ({type(error).__name__}: {error}); save or download it again."
            ) from error
        if sorted(tensors) != sorted(expected_whole):
            raise SMTError(
                f"{DELTA_FILE} and {CONFIG_FILE} in {folder} do not belong together: expected the whole tensors "
                f"{expected_whole}, got {sorted(tensors)}. Save or download the delta again."
            )
        for name, values in blocks.items():
            expected = (len(selection.block_indices[name]), *selection.grids[name].block_shape)
            if tuple(values.shape) != expected:
                raise SMTError(
                    f"the blocks of `{name}` in {folder} have shape {list(values.shape)}, expected {list(expected)}. "
                    "The delta is damaged; save or download it again."
                )
        return cls(selection, blocks, tensors, base_fingerprint, dtype)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path, "delta") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def save_delta(model: nn.Module, folder: str | Path, *, master: bool = False) -> None:
    """Write the trained blocks of a rewritten model.

    Args:
        model: rewritten by `convert_to_smt`, `load_delta` or SMTTrainer.
        folder: made if need be; an older delta in it is replaced.
        master: keep the blocks in the master dtype, to go on training; by default they are stored in the dtype of the
            weights, which is what forward and merging use.

    Raises:
        SMTError: the model trains no blocks.
    """
    state, folder = get_state(model), Path(folder)
    tensors = {}
    for name, layer in smt_layers(model):
        dtype = layer.blocks.dtype if master else layer.weight.dtype
        tensors[f"{name}.blocks"] = layer.blocks.detach().to("cpu", dtype)
        tensors[f"{name}.block_indices"] = layer.block_indices.cpu()
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in whole_parameters(model)}
    manifest = {
        "format": FORMAT,
        "fingerprint": state.fingerprint,
        "weight_dtype": str(state.weight_dtype).removeprefix("torch."),
        "whole": sorted(whole),
        "selection": _without_indices(state.selection),
    }
    write_text(folder / CONFIG_FILE, json.dumps(manifest, indent=2))
    write_atomically(
        folder / DELTA_FILE, lambda path: save_file(tensors | whole, path, metadata={"format": "pt", "smt": FORMAT})
    )


def _without_indices(selection: BlockSelection) -> dict[str, Any]:
    described = selection.to_dict()
    for module in described["modules"].values():
        del module["block_indices"]
    return described


def load_delta(model: nn.Module, folder: str | Path, *, merge: bool = False) -> nn.Module:
    """Put a delta into a model, in place.

    Args:
        model: the plain base model, which becomes a rewritten one that can be trained further; or a model that
            already trains the same blocks.
        folder: a delta folder or a checkpoint of SMTTrainer.
        merge: make the model plain again with the trained values in its weights.

    Returns:
        The same model.

    Raises:
        SMTError: the delta is damaged, or belongs to another base or other blocks; the model is unchanged then.
    """
    put_delta(model, Delta.read(folder))
    return merge_and_unload(model) if merge else model


def put_delta(model: nn.Module, delta: Delta) -> None:
    """`load_delta` for a delta that was read already, without merging."""
    if is_smt_model(model):
        _check_same_blocks(model, delta)
    else:
        find_linears(model, delta.selection)
        check_base(delta, base_name(model), fingerprint(model, delta.selection, delta.weight_dtype))
    whole = _whole_destinations(model, delta)
    if not is_smt_model(model):
        convert_to_smt(model, delta.selection)
    with torch.no_grad():
        for name, layer in smt_layers(model):
            layer.blocks.copy_(delta.blocks[name][_row_major_rank(layer)])
        for name, tensor in delta.whole.items():
            whole[name].copy_(tensor)
    write_back(layer for _, layer in smt_layers(model))


def from_delta(folder: str | Path, auto_class: Any = None, *, base: str | None = None, merge: bool = True, **kwargs):
    """Load a delta's base model and put the delta into it.

    Args:
        folder: a delta folder.
        auto_class: the class to load the base with; `transformers.AutoModelForCausalLM` by default.
        base: hub name or path of the base; by default the name that the delta records.
        merge: return a plain model.
        kwargs: for `auto_class.from_pretrained`; `dtype` is that of training by default.

    Raises:
        SMTError: as `load_delta`, and when neither `base` is given nor one is recorded.
    """
    if auto_class is None:
        from transformers import AutoModelForCausalLM as auto_class
    delta = Delta.read(folder)
    if base is None:
        base, _, revision = (delta.selection.base_model or "").partition("@")
        if revision:
            kwargs.setdefault("revision", revision)
    if not base:
        raise SMTError(f"the delta in {folder} records no base model; pass base=<hub name or path>.")
    model = auto_class.from_pretrained(base, **{"dtype": delta.weight_dtype} | kwargs)
    put_delta(model, delta)
    return merge_and_unload(model) if merge else model


def check_base(delta: Delta, name: str | None, found: str) -> None:
    """Refuse a base whose blocks are not those the delta was trained from; warn when only its name differs.

    Raises:
        SMTError: the fingerprints differ.
    """
    expected = delta.selection.base_model
    if found != delta.fingerprint:
        raise SMTError(
            f"the delta was trained on {expected or 'another base model'}, and the weights of "
            f"{name or 'this model'} differ from it where the blocks lie (fingerprint {found[:12]}, expected "
            f"{delta.fingerprint[:12]}). Load the base that the delta was trained on, in {delta.weight_dtype} or finer."
        )
    if expected and name and expected.partition("@")[0].split("/")[-1] != name.partition("@")[0].split("/")[-1]:
        logger.warning("The delta names %s as its base, this is %s; the weights agree.", expected, name)


def _check_same_blocks(model: nn.Module, delta: Delta) -> None:
    state = get_state(model)
    ours, theirs = state.selection.block_indices, delta.selection.block_indices
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if not same or state.fingerprint != delta.fingerprint:
        raise SMTError(
            "the delta holds other blocks, or of another base, than this model trains. Load it into the plain base "
            "model instead."
        )


def _whole_destinations(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    find_modules_to_save(model, delta.selection.config.modules_to_save, delta.selection.block_indices)
    destinations = dict(model.state_dict(keep_vars=True))
    for name, tensor in delta.whole.items():
        if name not in destinations or destinations[name].shape != tensor.shape:
            found = list(destinations[name].shape) if name in destinations else "none"
            raise SMTError(
                f"the delta holds `{name}` of shape {list(tensor.shape)}; this model has {found}. Load the base with "
                "the same head (number of labels) as in training."
            )
    return destinations


def _row_major_rank(layer: SMTLinear) -> Tensor:
    """For each block of the layer, in its own order, its place when they are listed row by row."""
    rows, columns = layer.block_indices.long().cpu().unbind(1)
    return torch.argsort(torch.argsort(rows * layer.grid.shape[1] + columns))
