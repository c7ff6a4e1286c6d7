"""Find the weights of linears that a checkpoint stores under other names, or among others in one tensor.

A name that is not in the checkpoint is not taken for another that only looks alike: what loading renames comes first.
"""

from __future__ import annotations

from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.conversion import look_up
from smt_trainer.model.names import find_names


def find_renamed(names: list[str], checkpoint: Checkpoint) -> dict[str, list[MatrixRows]]:
    """Return name of a linear -> where its weight lies in a checkpoint that renames or splits tensors on loading."""
    known = look_up(checkpoint)
    located = {name: MatrixRows(key) for name, key in checkpoint.names.items()}
    located |= {name: MatrixRows(key, among=(first, count)) for name, (key, first, count) in known.fused.items()}
    weights = find_names([f"{name}.weight" for name in names], located)
    return {key.removesuffix(".weight"): [located[other]] for key, other in weights.items()}
