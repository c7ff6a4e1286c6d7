"""The state of a rewritten model: what it trains, the base it came from, and how it was before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.fingerprint import Fingerprint, persistent_buffers
from smt_trainer.model.merged import is_merged
from smt_trainer.model.sharded import full_shape, full_tensor
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.block_module import block_modules


@dataclass(frozen=True)
class SMTState:
    """The state of a rewritten model, in its attribute `smt_state`.

    Attributes:
        selection: the blocks it trains.
        whole: full names of the modules, parameters and buffers that the delta stores whole.
        fingerprint: checksums of the base (see `model/fingerprint.py`).
        weight_dtype: dtype of the dense weights, in which merging is exact.
        newly_initialised: names of the newly initialised parameters.
        was_trainable: names of the parameters that required a gradient before rewriting.
        statistics: name of a persistent buffer -> its value before training; forward may change it.
        quantization: the `quantization_config` of a quantised base, as JSON types.
    """

    selection: BlockSelection
    whole: tuple[str, ...]
    fingerprint: Fingerprint
    weight_dtype: torch.dtype
    newly_initialised: frozenset[str] = frozenset()
    was_trainable: frozenset[str] = frozenset()
    statistics: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None


def is_smt_model(model: nn.Module) -> bool:
    """Return whether `convert_to_smt` or `load_delta` has rewritten this model."""
    return hasattr(model, "smt_state")


def has_quantised_blocks(model: nn.Module) -> bool:
    """Return whether blocks of a rewritten model lie in quantised weights."""
    return any(not linear.weight_holds_blocks for _, linear in block_modules(model))


def get_state(model: nn.Module) -> SMTState:
    """Return the state of a rewritten model. Raise `SMTError` for a plain one."""
    state: Any = getattr(model, "smt_state", None)
    if state is None and is_merged(model):
        raise SMTError("this model is plain: it is merged already, as from_delta returns it unless merge=False.")
    if state is None:
        raise SMTError("this model trains no blocks; train it with SMTTrainer, or call convert_to_smt or load_delta.")
    return state


def set_state(model: nn.Module, state: SMTState) -> None:
    """Store the state of a rewritten model in it."""
    model.smt_state = state  # pyrefly: ignore[bad-argument-type]  # torch declares tensors and modules only


def trainable_parameters(model: nn.Module) -> int:
    """Count the parameters that require a gradient; count tied weights once."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters() if parameter.requires_grad)


def changed_statistics(model: nn.Module) -> set[str]:
    """Return the full names of the persistent buffers that forward has changed since the model was rewritten."""
    before = get_state(model).statistics
    return {name for name, buffer in persistent_buffers(model) if not _equal(buffer, before.get(name))}


def _equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(full_tensor(buffer), before.to(buffer.device))
