"""Mark plain models that a delta was merged into, since no checkpoint holds their values.

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
    """Mark a model as having a delta merged into it, or remove the mark."""
    vars(model)[ATTRIBUTE] = merged
