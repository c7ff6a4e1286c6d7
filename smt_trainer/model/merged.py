"""Whether the values of a plain model are a base's with a delta merged into them, so that they have no checkpoint.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ATTRIBUTE = "smt_merged"


def is_merged(model: nn.Module) -> bool:
    """Return whether a delta was merged or swapped into this model in memory."""
    return getattr(model, ATTRIBUTE, False)


def mark_merged(model: nn.Module, merged: bool = True) -> None:
    """Note in a model whether a delta is merged into it."""
    vars(model)[ATTRIBUTE] = merged
