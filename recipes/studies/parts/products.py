"""Products of bfloat16 on a processor without instructions for them: computed in float32, then rounded.

Such instructions also sum in float32, so only the order of the sums differs. PyTorch's fallback takes ten times as
long.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from recipes.parts.dtype import has_bfloat16_products

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def bfloat16_products() -> AbstractContextManager:
    """Return a context manager that computes products of bfloat16 in the fastest way that this machine has."""
    return nullcontext() if are_in_hardware() else RoundedProducts()


def are_in_hardware() -> bool:
    """Return whether this machine has instructions for products of bfloat16."""
    return torch.cuda.is_available() or has_bfloat16_products()


class RoundedProducts(TorchDispatchMode):
    """Compute the products of bfloat16 tensors in float32, and round the results."""

    def __torch_dispatch__(
        self, operator: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return operator(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), torch.bfloat16, torch.float32)
        result = operator(*args, **kwargs)
        if operator is ATTENTION:
            output, log_sums = result
            return output.bfloat16(), log_sums  # in float32 for any input
        return _cast(result, torch.float32, torch.bfloat16)


def _cast(tree: Any, dtype: torch.dtype, to: torch.dtype) -> Any:
    """Return `tree` with its tensors of `dtype` cast."""
    return tree_map(lambda leaf: leaf.to(to) if isinstance(leaf, Tensor) and leaf.dtype == dtype else leaf, tree)
