"""Find where the values of a delta belong in the files of a checkpoint.

torch is imported only where `model/conversion.py` has to ask transformers.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smt_trainer.arrays import FLOATS, cast
from smt_trainer.delta.delta import Delta
from smt_trainer.errors import SMTError
from smt_trainer.merging.expert_files import IN_MEMORY, find_experts
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.merging.renamed import find_renamed
from smt_trainer.merging.site import Site
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.conversion import look_up
from smt_trainer.model.names import find_names


def find_parts(delta: Delta, checkpoint: Checkpoint) -> dict[str, list[MatrixRows]]:
    """Return module with blocks -> where its weight lies in a checkpoint."""
    parts = {
        name: [MatrixRows(f"{name}.weight")] for name in delta.block_arrays if f"{name}.weight" in checkpoint.tensors
    }
    others = [name for name in delta.block_arrays if name not in parts]
    experts = [name for name in others if name.rpartition(".")[2].isdecimal()]
    if experts:
        parts |= find_experts(experts, checkpoint)
    missing = [name for name in others if name not in parts]
    if missing:
        parts |= find_renamed(missing, checkpoint)
    refuse_missing([f"{name}.weight" for name in others if name not in parts], checkpoint.folder)
    return parts


def find_sites(delta: Delta, parts: Mapping[str, list[MatrixRows]], checkpoint: Checkpoint) -> dict[str, list[Site]]:
    """Return name of a tensor in a checkpoint -> the blocks of a delta that lie in it."""
    selection, sites = delta.selection, {}
    for name, found in parts.items():
        grid, indices = selection.grids[name], selection.block_indices[name]
        whole = Site(name, grid, indices, delta.block_arrays[name], found[0].expert)
        for part in found:
            rows = checkpoint.tensors[part.key].shape[0]
            site = whole if len(found) == 1 else whole.rows(part.first_row, rows)
            if part.among is not None:
                site = whole.rows(-part.among[0], rows)
            if len(site.blocks):
                sites.setdefault(part.key, []).append(site)
    return sites


def find_keys(delta: Delta, checkpoint: Checkpoint) -> dict[str, str]:
    """Return whole tensor of a delta -> its name in a checkpoint, without tensors that the checkpoint lacks."""
    if delta.whole_arrays.keys() <= checkpoint.tensors.keys():
        return {name: name for name in delta.whole_arrays}
    look_up(checkpoint)
    names = checkpoint.names
    return {name: names[other] for name, other in find_names(delta.whole_arrays, names).items()}


def find_grown(delta: Delta, sites: Mapping[str, list[Site]], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return tensors of a checkpoint with the rows of new tokens added, where a delta trains all of these in blocks."""
    found = {}
    for key, (site, *_) in sites.items():
        stored = checkpoint.tensors[key]
        before, *others = stored.shape
        # A site's grid covers only the rows that its tensor has or should have; in a stack, rows come second.
        if site.expert is not None or before >= site.grid.stored_shape[0]:
            continue
        rows = delta.selection.new_rows(site.name, before)
        if rows and tuple(others) == site.grid.stored_shape[1:] and stored.dtype in FLOATS:
            base = checkpoint.array(stored)
            found[key] = np.concatenate([base, np.zeros((len(rows), *others), base.dtype)])
            site.put(found[key], cast(site.blocks, stored.dtype))
    return found


def refuse_missing(names: list[str], folder: Path) -> None:
    """Raise `SMTError` if there are any names, those of tensors that a checkpoint lacks."""
    if names:
        raise SMTError(
            f"{folder} has no tensor `{names[0]}`. If its architecture renames tensors on loading, or the delta has "
            f"a new head, {IN_MEMORY}."
        )
