"""The delta: a folder with the trained blocks, their indices and a record of their base.

    smt_delta.safetensors   <module>.blocks         [n, br, bc]  trained values (not differences, so merging is exact)
                            <module>.block_indices  [n, 2] int32 (row, column) in the module's grid
                            <parameter>             whole tensors of `modules_to_save`, norms, biases
                            its metadata holds the manifest: format, configuration, grids, name and fingerprint of the
                            base, how it was quantised, dtype of its weights, checksum of all this
    smt_config.json         a copy of the manifest, for people and other programs to read

The tensors file alone is the delta. It is replaced in one step, so an interrupted write leaves the earlier delta. Both
files are plain data; nothing is unpickled. They are read, checked and written as numpy arrays; torch is imported only
where a model is involved.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smt_trainer.arrays import as_array, as_tensor, dtype_name, torch_name
from smt_trainer.delta.checks import check_dtypes, check_finite, check_manifest, check_whole, take_indices, widened
from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE, refuse_full_model
from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically, write_text
from smt_trainer.manifest import load_sealed, refusing_damage, sealed
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.tensor_file import save_arrays

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = "2"
MANIFEST = "smt"


@dataclass(frozen=True, eq=False)
class Delta:
    """A checked delta in memory.

    Attributes:
        selection: the blocks, their model and how they were chosen.
        block_arrays: module name -> trained values [n, br, bc], in the order of `selection.block_indices`.
        whole_arrays: name of a parameter or buffer -> values, for what is trained whole or newly initialised.
        fingerprint: checksums of the base (see `model/fingerprint.py`).
        weight_dtype: dtype of the base weights in training, such as "bfloat16"; merging into this dtype is exact.
        architecture: class of the trained model, such as "LlamaForCausalLM".
        unnamed: whole tensors that the configuration does not name: newly initialised on loading, changed by forward,
            unfrozen by the user, extracted or composed.
        quantization: the `quantization_config` of a quantised base.

    Raises:
        SMTError: a module lacks its blocks, or they have another shape.
    """

    selection: BlockSelection
    block_arrays: dict[str, np.ndarray]
    whole_arrays: dict[str, np.ndarray]
    fingerprint: Fingerprint
    weight_dtype: str
    architecture: str = ""
    unnamed: list[str] = field(default_factory=list)
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, indices in self.selection.block_indices.items():
            values, expected = self.block_arrays.get(name), (len(indices), *self.selection.grids[name].block_shape)
            if values is None or values.shape != expected:
                found = "none" if values is None else f"shape {list(values.shape)}"
                raise SMTError(
                    f"the delta's blocks of `{name}` should have shape {list(expected)}, got {found}. It is "
                    "damaged; save or download it again."
                )

    def __repr__(self) -> str:
        return f"<Delta on {self.selection.base_model}: {self.selection.summary()}>"

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        """The `block_arrays` as tensors."""
        return {name: as_tensor(values) for name, values in self.block_arrays.items()}

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """The `whole_arrays` as tensors."""
        return {name: as_tensor(values) for name, values in self.whole_arrays.items()}

    @classmethod
    def of(cls, model: nn.Module, *, master: bool = False) -> Delta:
        """Return the delta of a rewritten model as it is now; a collective when the model is sharded over ranks.

        Args:
            model: rewritten by `convert_to_smt`, `load_delta` or SMTTrainer.
            master: keep the blocks in the master dtype, to continue training; by default, cast them to the dtype of
                the weights, as forward and merging do.

        Raises:
            SMTError: the model trains no blocks.
        """
        from smt_trainer.model.sharded import full_tensor
        from smt_trainer.sparse.block_module import block_modules
        from smt_trainer.sparse.state import get_state
        from smt_trainer.sparse.whole_tensors import WholeTensors, warn_of_others

        state, blocks = get_state(model), {}
        for name, linear in block_modules(model):
            dtype = linear.blocks.dtype if master else linear.weight_dtype
            blocks[name] = as_array(full_tensor(linear.blocks).to("cpu", dtype)[linear.row_major_order()])
        held = WholeTensors.of(model)
        warn_of_others(model, held)
        copies = {name: full_tensor(tensor).detach().to("cpu", copy=True) for name, tensor in held.tensors.items()}
        whole = {name: as_array(tensor) for name, tensor in copies.items()}
        unnamed = sorted((state.newly_initialised | held.unnamed) & whole.keys())
        dtype, architecture = torch_name(state.weight_dtype), architecture_of(model)
        return cls(state.selection, blocks, whole, state.fingerprint, dtype, architecture, unnamed, state.quantization)

    def save(self, folder: str | Path) -> None:
        """Write the delta to a folder; make the folder if needed, and replace an older delta in one step.

        Raises:
            SMTError: a value is NaN or infinite. The older delta stays.
        """
        check_finite(self)
        selection = self.selection.to_dict()
        for module in selection["modules"].values():
            del module["block_indices"]
        manifest = {
            "format": FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "architecture": self.architecture,
            "unnamed": self.unnamed,
            "weight_dtype": self.weight_dtype,
            "quantization": self.quantization,
            "whole": sorted(self.whole_arrays),
            "selection": selection,
        }
        master = self.selection.config.master_dtype
        arrays = {
            f"{name}.blocks": blocks if dtype_name(blocks) == master else widened(self, blocks)
            for name, blocks in self.block_arrays.items()
        }
        block_indices = self.selection.block_indices
        arrays |= {f"{name}.block_indices": found.astype(np.int32) for name, found in block_indices.items()}
        arrays |= self.whole_arrays
        manifest = sealed(manifest, arrays)
        metadata = {"format": "pt", MANIFEST: json.dumps(manifest)}
        write_atomically(Path(folder, DELTA_FILE), lambda path: save_arrays(arrays, path, metadata))
        write_text(Path(folder, MANIFEST_FILE), json.dumps(manifest, indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> Delta:
        """Read and check a delta folder. Raise `SMTError` if it is missing or damaged, or a value is out of range."""
        manifest, arrays = load_sealed(Path(folder, DELTA_FILE), MANIFEST, FORMAT, "delta")
        with refusing_damage(f"delta in {folder}"):
            check_manifest(manifest, folder)
            blocks, described = {}, manifest["selection"]
            for name, module in described["modules"].items():
                indices = take_indices(arrays, name)
                order = np.lexsort(indices.T[::-1])
                module["block_indices"] = indices[order].tolist()
                if len(indices):
                    values, is_sorted = arrays.pop(f"{name}.blocks"), np.array_equal(order, np.arange(len(order)))
                    blocks[name] = values if is_sorted else values[order]
            selection = BlockSelection.from_dict(described)
            if sorted(arrays) != manifest["whole"]:
                raise SMTError(
                    f"the delta in {folder} is damaged: expected the whole tensors {manifest['whole']}, got "
                    f"{sorted(arrays)}. Save or download it again."
                )
            fingerprint = Fingerprint(**manifest["fingerprint"])
            described = (manifest[key] for key in ("weight_dtype", "architecture", "unnamed", "quantization"))
            delta = cls(selection, blocks, arrays, fingerprint, *described)
            check_dtypes(delta)
            check_finite(delta)
            check_whole(delta)
            return delta


def architecture_of(model: nn.Module) -> str:
    """Return the name of a model's class, without the `FSDP...` subclass that FSDP2 makes of it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def save_delta(model: nn.Module, folder: str | Path, *, master: bool = False) -> None:
    """Write the trained blocks of a rewritten model: `Delta.of(model, master=master).save(folder)`.

    Raises:
        SMTError: the model trains no blocks, or the folder holds a whole model.
    """
    refuse_full_model(Path(folder))
    Delta.of(model, master=master).save(folder)
