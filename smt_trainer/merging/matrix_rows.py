"""The tensors of a checkpoint that hold a matrix, and reading it from them. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smt_trainer.model.checkpoint import Checkpoint


class MatrixRows(NamedTuple):
    """Rows of a matrix in a tensor.

    Attributes:
        key: name of the tensor.
        first_row: from which row of the matrix on.
        expert: where the matrix lies in the first dimension of the tensor; None for a tensor of its own.
        within: the rows of the tensor that hold them, where it also holds other matrices.
    """

    key: str
    first_row: int = 0
    expert: int | None = None
    within: slice | None = None


def read_matrix(checkpoint: Checkpoint, parts: list[MatrixRows]) -> np.ndarray:
    """Return a matrix as it is stored, read-only; the file stays mapped unless it lies in several tensors."""
    found = []
    for part in parts:
        tensor = checkpoint.array(checkpoint.tensors[part.key])
        tensor = tensor if part.expert is None else tensor[part.expert]
        found.append(tensor if part.within is None else tensor[part.within])
    return found[0] if len(found) == 1 else np.concatenate(found)
