"""Make the reference model of preference and reinforcement learning equal to the model that the trainer was given.

TRL loads a reference by the name in the model's configuration. After a first fine-tuning that name still refers to the
untuned base, whether the deltas were merged in memory or the model trains blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from smt_trainer.errors import SMTError
from smt_trainer.model.merged import is_merged
from smt_trainer.sparse.plain import plain_state_dict
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.training.distributed import is_sharding

if TYPE_CHECKING:
    from transformers import Trainer


def is_reference_given(trainer: Trainer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a reference model is among the arguments that a trainer was made with.

    A subclass may take them as `*args, **kwargs`: the first class with a parameter `ref_model` gives its position.
    """
    for kind in type(trainer).__mro__:
        names = list(inspect.signature(kind.__init__).parameters)
        if "ref_model" in names:
            position = names.index("ref_model") - 1
            return (args[position] if position < len(args) else kwargs.get("ref_model")) is not None
    return False


@torch.no_grad()
def match_reference(trainer: Trainer) -> None:
    """Copy the values of a trainer's model to the reference that the trainer has loaded itself, before training.

    Raises:
        SMTError: the reference has other parameters, or is sharded over ranks and known to have other values.
    """
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    if model is None or reference is None:
        return
    remedy = "Pass ref_model=copy.deepcopy(model) before training."
    if is_sharding(trainer.accelerator):
        if is_smt_model(model) or is_merged(model):
            raise SMTError(f"the reference model is the untuned base, and it is sharded over ranks already. {remedy}")
        return
    ours = plain_state_dict(model)
    plain: Any = trainer.accelerator.unwrap_model(reference)
    theirs = plain.state_dict(keep_vars=True)
    other = [name for name in theirs if name not in ours or ours[name].shape != theirs[name].shape]
    if other:
        raise SMTError(
            f"the reference model, loaded by the name in the model's configuration, has `{other[0]}`, which the "
            f"trained model does not have in that shape. {remedy}"
        )
    for name, tensor in theirs.items():
        tensor.copy_(ours[name])
