"""Describe in one line which parts of a model are trained."""

from __future__ import annotations

from torch import nn

from smt_trainer.model.names import list_projections
from smt_trainer.sparse.state import get_state, trainable_parameters


def trained_parts(model: nn.Module) -> str:
    """Describe how much of a rewritten model is trained, which blocks, and what else is trained or stored.

    Raises:
        SMTError: the model trains no blocks.
    """
    state = get_state(model)
    selection, trained = state.selection, trainable_parameters(model)
    parts = {
        "whole": [name for name in state.whole if name not in state.newly_initialised],
        "new, not in the checkpoint": [name for name in state.whole if name in state.newly_initialised],
        "statistics, if forward changes them": list(state.statistics),
    }
    beside = "".join(f"; {what}: {list_projections(names)}" for what, names in parts.items() if names)
    return (
        f"trainable parameters: {trained:,} of {selection.num_parameters:,} "
        f"({trained / selection.num_parameters:.3%} of the model); {selection.summary()}{beside}"
    )
