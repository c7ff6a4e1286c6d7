"""Describe which tensors of a checkpoint hold a matrix, and read it from them. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smt_trainer.model.checkpoint import Checkpoint


class MatrixRows(NamedTuple):
    """The rows of a matrix that a tensor holds.

    Attributes:
        key: name of the tensor.
        first_row: the first of these rows in the matrix.
        expert: index of the matrix in the first dimension of a tensor of all experts; None for other tensors.
        among: first row and number of the tensor's rows that hold them, if it also holds other matrices.
    """

    key: str
    first_row: int = 0
    expert: int | None = None
    among: tuple[int, int] | None = None


def read_matrix(checkpoint: Checkpoint, parts: list[MatrixRows]) -> np.ndarray:
    """Return a matrix as it is stored, read-only: a view of the mapped file, unless it lies in several tensors."""
    found = []
    for part in parts:
        tensor = checkpoint.array(checkpoint.tensors[part.key])
        tensor = tensor if part.expert is None else tensor[part.expert]
        first, count = part.among or (0, len(tensor))
        found.append(tensor[first : first + count])
    return found[0] if len(found) == 1 else np.concatenate(found)
