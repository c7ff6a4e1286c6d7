"""Apply weight patches as a server would."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from smt_trainer import SMTError
from smt_trainer.export.weight_patch import WeightPatch


@torch.no_grad()
def apply_patches(state: Mapping[str, Tensor], patches: Iterable[WeightPatch]) -> None:
    """Write patches into tensors in place, in their order.

    Args:
        state: tensor name -> tensor, such as a plain model's `state_dict()`.
        patches: the patches; all are read and checked before anything is written.

    Raises:
        SMTError: a tensor is unknown, or has another shape or dtype. Nothing is written.
    """
    patches = list(patches)
    for patch in patches:
        tensor = state.get(patch.name)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (tuple(patch.shape), patch.dtype):
            found = "none" if tensor is None else f"{tensor.dtype} of {list(tensor.shape)}"
            raise SMTError(
                f"a patch is for `{patch.name}`, {patch.dtype} of {list(patch.shape)}; here is {found}. Use the base "
                "that the patches were made for."
            )
    for patch in patches:
        tensor, values = state[patch.name], patch.values.to(state[patch.name].device)
        if patch.indices is None:
            tensor.copy_(values.view(patch.shape))
        else:
            tensor.put_(patch.indices.to(tensor.device).long(), values)
