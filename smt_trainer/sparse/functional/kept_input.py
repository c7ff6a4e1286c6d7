"""Keep the input x of the sparse linear for backward: without memory of its own, where possible.

The frozen module before it often keeps tensors for its own backward from which x can be recomputed bit for bit:

    RMSNorm      x = cast(h * rstd) * w             keeps h, rstd and w, in all models that write it this way
    LayerNorm    x = (h - mean) * rstd * w + b      keeps h, mean, rstd, w and b
    gated MLP    x = act(g) * u                     keeps act(g) and u

with h, x [..., I], mean and rstd [..., 1], w and b [I]. Experts read some of its rows, x[tokens]; the indexing keeps
`tokens`. The graph that autograd has just built shows which tensors exist (`_saved_*` of its nodes), so the
architecture does not matter. The sparse linear refers to these tensors, which takes no memory. Its backward recomputes
x from them, but only the columns that have blocks.

Otherwise the sparse linear keeps x itself, by reference. This takes no memory if another module keeps x too (the output
of attention). If not, it takes the memory of x once, however many linears share x (query, key and value). It does so

- where x is not such a product or was changed in place, or where nothing before x requires a gradient: in the lowest
  layer with blocks;
- under hooks on saved tensors: activation checkpointing keeps none of these tensors, and offloading may move x, but
  reading the tensors of other nodes would fetch them back;
- under torch.compile, which decides by itself what to recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smt_trainer.model.sharded import is_partitioned

VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class KeptInput(NamedTuple):
    """An input x [..., I], as kept tensors and the steps that compute x from them; without steps, x itself.

    Attributes:
        tensors: each [..., I], [..., 1], [I] or a scalar.
        steps: applied in order to the first tensor. A dtype casts, "mul" and "sub" take the next tensor, "affine"
            multiplies by the next tensor and adds the one after. The last step may be "rows", which selects the tokens
            whose indices the last tensor holds.
    """

    tensors: tuple[Tensor, ...]
    steps: tuple[str | torch.dtype, ...] = ()

    def columns(self, start: int, length: int) -> Tensor:
        """Compute columns `start` to `start + length` of x [T, I], over its flattened tokens."""
        factors = self.tensors[:-1] if self.steps[-1:] == ("rows",) else self.tensors
        x, *others = (_columns(tensor, start, length) for tensor in factors)
        for step in self.steps:
            if step == "mul":
                x = x * others.pop(0)
            elif step == "sub":
                x = x - others.pop(0)
            elif step == "affine":
                weight, bias = others.pop(0), others.pop(0)
                x = torch.addcmul(bias, x, weight)
            elif step == "rows":
                x = x[self.tensors[-1]]
            else:
                x = x.to(step)
        return x

    def some(self, take: Callable[[Tensor], Tensor]) -> KeptInput:
        """Return the input of some tokens; `take` picks their rows from a tensor with a row for each token."""
        if self.steps[-1:] != ("rows",):
            return KeptInput(tuple(take(tensor) if tensor.ndim > 1 else tensor for tensor in self.tensors), self.steps)
        *tensors, rows = self.tensors
        mine = take(rows[:, None]).flatten()
        picked = (tensor.flatten(0, -2)[mine] if tensor.ndim > 1 else tensor for tensor in tensors)
        return KeptInput(tuple(picked), self.steps[:-1])


def _columns(tensor: Tensor, start: int, length: int) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor
    return flat if flat.ndim == 0 or flat.shape[-1] == 1 else flat.narrow(-1, start, length)


def find_origin(x: Tensor) -> KeptInput | None:
    """Find tensors that autograd keeps anyway and from which x can be recomputed; None if there are none."""
    if torch.compiler.is_compiling() or x.grad_fn is None or x.ndim < 2 or _saved_tensors_are_hooked():
        return None
    # Changed in place since it was computed, maybe without a gradient, which leaves no trace in the graph.
    if x._version:
        return None
    rows, node = _selection(x)
    origin = _trace(node)
    if origin is None:
        return None
    shape = x.shape if rows is None else torch.Size(node._input_metadata[0].shape)
    # ZeRO-3 empties its parameters between uses.
    if not all(_is_aligned(each, shape) and not is_partitioned(each) for each in origin.tensors):
        return None
    return origin if rows is None else KeptInput((*origin.tensors, rows), (*origin.steps, "rows"))


def _selection(x: Tensor) -> tuple[Tensor | None, Any]:
    """Return (row indices, node of the tensor they index) if x selects rows of a tensor, else (None, x's node)."""
    node: Any = x.grad_fn
    if type(node).__name__ != "IndexBackward0" or x.ndim != 2:
        return None, node
    rows, node = node._saved_indices, node.next_functions[0][0]
    while type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    is_plain = len(rows) == 1 and rows[0] is not None and rows[0].dtype == torch.int64 and rows[0].ndim == 1
    # A view may also have cut the tokens, into heads for example.
    is_plain = is_plain and node is not None and list(node._input_metadata[0].shape)[-1:] == [x.shape[-1]]
    return (rows[0], node) if is_plain else (None, x.grad_fn)


def _trace(node: Any) -> KeptInput | None:
    """Express the output of an autograd node by the tensors that it and the nodes before it keep."""
    match type(node).__name__:
        case "ToCopyBackward0":
            origin = _trace(node.next_functions[0][0])
            return origin and KeptInput(origin.tensors, (*origin.steps, node._input_metadata[0].dtype))
        case "MulBackward0":
            kept = [factor for factor in (node._saved_self, node._saved_other) if factor is not None]
            if len(kept) == 2:
                return KeptInput(tuple(kept), ("mul",))
            origin = _trace(node.next_functions[0 if node._saved_self is None else 1][0])
            return origin and KeptInput((*origin.tensors, *kept), (*origin.steps, "mul"))
        case "NativeLayerNormBackward0":
            return _layer_norm(node)
    return None


def _layer_norm(node: Any) -> KeptInput | None:
    h, mean, rstd, weight, bias = (
        getattr(node, f"_saved_{name}") for name in ("input", "result1", "result2", "weight", "bias")
    )
    # If everything is in half precision, mean and rstd are kept rounded.
    if len(node._saved_normalized_shape) != 1 or weight is None or bias is None or mean.dtype.itemsize < 4:
        return None
    return KeptInput((h, mean, rstd, weight, bias), ("sub", "mul", "affine", node._input_metadata[0].dtype))


def _is_aligned(tensor: Tensor, shape: torch.Size) -> bool:
    """Return whether a tensor matches x [..., I] token by token: it is [..., I], [..., 1], [I] or a scalar."""
    if tensor.ndim <= 1:
        return tensor.ndim == 0 or tensor.shape[0] in (1, shape[-1])
    return tensor.shape[:-1] == shape[:-1] and tensor.shape[-1] in (1, shape[-1])


def _saved_tensors_are_hooked() -> bool:
    """Return whether hooks on saved tensors are active now. torch has no public way to ask."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
