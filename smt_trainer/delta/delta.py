"""The delta: a folder with the trained blocks, their positions and a record of their base.

    smt_delta.safetensors   <module>.blocks         [n, br, bc]  trained values (not differences, so merging is exact)
                            <module>.block_indices  [n, 2] int32 (row, column) in the module's grid
                            <parameter>             whole tensors of `modules_to_save`, norms, biases
                            its metadata holds the manifest: format, configuration, grids, name and fingerprint of the
                            base, dtype of its weights
    smt_config.json         a copy of the manifest, for people and other programs to read

The tensors file alone is the delta. It is replaced in one step, so an interrupted write leaves the earlier delta. Both
files are plain data; nothing is unpickled.
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

from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically, write_text
from smt_trainer.manifest import check_format, load_tensors, refusing_damage
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import assign, full_shape, full_tensor
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.block_selection import BlockSelection, base_name
from smt_trainer.sparse.convert import (
    Model,
    SMTState,
    find_linears,
    get_state,
    is_smt_model,
    merge_and_unload,
    rewrite_as,
    whole_parameters,
)
from smt_trainer.sparse.fingerprint import fingerprint
from smt_trainer.sparse.linear import smt_linears
from smt_trainer.sparse.write_back import write_back

logger = logging.getLogger(__name__)

DELTA_FILE = "smt_delta.safetensors"
CONFIG_FILE = "smt_config.json"
FORMAT = "1"
MANIFEST = "smt"


@dataclass(frozen=True)
class Delta:
    """A checked delta in memory.

    Attributes:
        selection: the blocks, their model and how they were chosen.
        blocks: module name -> trained values [n, br, bc], in the order of `selection.block_indices`.
        whole: parameter name -> tensor, for what is trained whole.
        fingerprint: checksum of the base values of the blocks (see `sparse/fingerprint.py`).
        weight_dtype: dtype of the base weights in training; merging into this dtype is exact.
    """

    selection: BlockSelection
    blocks: dict[str, Tensor]
    whole: dict[str, Tensor]
    fingerprint: str
    weight_dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, indices in self.selection.block_indices.items():
            values, expected = self.blocks.get(name), (len(indices), *self.selection.grids[name].block_shape)
            if values is None or tuple(values.shape) != expected:
                found = "none" if values is None else f"shape {list(values.shape)}"
                raise SMTError(
                    f"the delta's blocks of `{name}` should have shape {list(expected)}, got {found}. It is "
                    "damaged; save or download it again."
                )

    @classmethod
    def of(cls, model: nn.Module, *, master: bool = False) -> Delta:
        """Return the delta of a rewritten model; a collective when the model is sharded over ranks.

        Args:
            model: rewritten by `convert_to_smt`, `load_delta` or SMTTrainer.
            master: keep the blocks in the master dtype, to continue training; by default, cast them to the dtype of
                the weights, as forward and merging do.

        Raises:
            SMTError: the model trains no blocks.
        """
        state, blocks = get_state(model), {}
        for name, linear in smt_linears(model):
            dtype = linear.blocks.dtype if master else linear.weight.dtype
            blocks[name] = full_tensor(linear.blocks).to("cpu", dtype)[linear.row_major_order()]
        whole = {name: full_tensor(tensor).cpu().contiguous() for name, tensor in whole_parameters(model)}
        return cls(state.selection, blocks, whole, state.fingerprint, state.weight_dtype)

    def save(self, folder: str | Path) -> None:
        """Write the delta to a folder; make the folder if needed, and replace an older delta in one step."""
        selection = self.selection.to_dict()
        for module in selection["modules"].values():
            del module["block_indices"]
        manifest = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "whole": sorted(self.whole),
            "selection": selection,
        }
        tensors = {f"{name}.blocks": blocks for name, blocks in self.blocks.items()}
        tensors |= {f"{name}.block_indices": found.int() for name, found in self.selection.block_indices.items()}
        metadata = {"format": "pt", MANIFEST: json.dumps(manifest)}
        write_atomically(
            Path(folder, DELTA_FILE), lambda path: save_file(tensors | self.whole, path, metadata=metadata)
        )
        write_text(Path(folder, CONFIG_FILE), json.dumps(manifest, indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> Delta:
        """Read and check a delta folder. Raise `SMTError` if it is missing, damaged or out of range."""
        manifest, tensors = load_tensors(Path(folder, DELTA_FILE), MANIFEST, "delta")
        with refusing_damage(f"delta in {folder}"):
            check_format(manifest, FORMAT, f"delta in {folder}")
            blocks, described = {}, manifest["selection"]
            for name, module in described["modules"].items():
                indices = tensors.pop(f"{name}.block_indices", torch.empty(0, 2, dtype=torch.int32)).long()
                order = torch.argsort(indices[:, 0] * (1 + indices[:, 1].max()) + indices[:, 1]) if len(indices) else []
                module["block_indices"] = indices[order].tolist()
                if len(indices):
                    blocks[name] = tensors.pop(f"{name}.blocks")[order]
            selection, dtype = BlockSelection.from_dict(described), getattr(torch, manifest["weight_dtype"])
            if sorted(tensors) != sorted(manifest["whole"]):
                raise SMTError(
                    f"the delta in {folder} is damaged: expected the whole tensors {manifest['whole']}, got "
                    f"{sorted(tensors)}. Save or download it again."
                )
            return cls(selection, blocks, tensors, manifest["fingerprint"], dtype)


def save_delta(model: nn.Module, folder: str | Path, *, master: bool = False) -> None:
    """Write the trained blocks of a rewritten model: `Delta.of(model, master=master).save(folder)`.

    Raises:
        SMTError: the model trains no blocks.
    """
    Delta.of(model, master=master).save(folder)


def load_delta(model: Model, folder: str | Path, *, merge: bool = False) -> Model:
    """Put a delta into a model, in place.

    Args:
        model: the plain base model, which is rewritten and can be trained further; or a model that already trains
            the same blocks.
        folder: a delta folder or a checkpoint of SMTTrainer.
        merge: make the model plain again with the trained values in its weights.

    Returns:
        The same model.

    Raises:
        SMTError: the delta is damaged, or belongs to another base or other blocks. The model stays unchanged.
    """
    put_delta(model, Delta.load(folder))
    return merge_and_unload(model) if merge else model


def put_delta(model: nn.Module, delta: Delta, *, has_weights: bool = True) -> None:
    """Put a delta from memory into a model, like `load_delta` without merging.

    Args:
        model: plain, or already training the same blocks.
        delta: the delta to put into it.
        has_weights: False on a rank that gets the base weights from another rank later; skips their check.
    """
    if is_smt_model(model):
        _check_same_blocks(model, delta)
        destinations = _whole_destinations(model, delta)
    else:
        linears = find_linears(model, delta.selection)
        whole = find_whole(model, delta.selection.config, linears, stored=delta.whole)
        destinations = _whole_destinations(model, delta)
        if has_weights:
            check_base(delta, base_name(model), fingerprint(model, delta.selection, delta.weight_dtype))
        dtype = next(iter(linears.values())).weight.dtype
        rewrite_as(model, SMTState(delta.selection, whole, delta.fingerprint, dtype))
    for name, linear in smt_linears(model):
        assign(linear.blocks, delta.blocks[name][linear.row_major_order().argsort()])
    for name, tensor in delta.whole.items():
        assign(destinations[name], tensor)
    write_back(linear for _, linear in smt_linears(model))


def from_delta(folder: str | Path, auto_class: Any = None, *, base: str | None = None, merge: bool = True, **kwargs):
    """Load a delta's base model and put the delta into it.

    Args:
        folder: a delta folder.
        auto_class: the class to load the base with; `transformers.AutoModelForCausalLM` by default.
        base: hub name or path of the base; by default the name that the delta records.
        merge: return a plain model.
        kwargs: passed to `auto_class.from_pretrained`; `dtype` defaults to that of training.

    Raises:
        SMTError: as in `load_delta`; or `base` is not given and the delta records none.
    """
    if auto_class is None:
        from transformers import AutoModelForCausalLM as auto_class
    delta = Delta.load(folder)
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
    """Refuse a base whose blocks differ from those before training; warn if only the name differs.

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
        logger.warning("The delta names %s as its base. This model is %s; the weights agree.", expected, name)


def _check_same_blocks(model: nn.Module, delta: Delta) -> None:
    state = get_state(model)
    ours, theirs = state.selection.block_indices, delta.selection.block_indices
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if not same or state.fingerprint != delta.fingerprint:
        raise SMTError(
            "the delta holds other blocks than this model trains, or blocks of another base. Load it into the plain "
            "base model instead."
        )


def _whole_destinations(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Return a model's tensors by name; raise `SMTError` unless what the delta trains whole fits them."""
    destinations = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in delta.whole.items():
        if name not in destinations or full_shape(destinations[name]) != tuple(tensor.shape):
            found = list(full_shape(destinations[name])) if name in destinations else "none"
            raise SMTError(
                f"the delta holds `{name}` of shape {list(tensor.shape)}; this model has {found}. Load the base with "
                "the same head (number of labels) as in training."
            )
    return destinations
