"""What the sparse linear keeps of its input x for backward: nothing of its own, wherever that is possible.

The frozen layer before it keeps tensors for its own backward that x can be made of again, as it was, bit for bit:

    RMSNorm      x = cast(h * rstd) * w             keeps h, rstd and w, for all models that write it so
    LayerNorm    x = (h - mean) * rstd * w + b      keeps h, mean, rstd, w and b
    gated MLP    x = act(g) * u                     keeps act(g) and u

with h, x [..., I], mean and rstd [..., 1], w and b [I]. Which of them there are is read off the graph that autograd has
just built (`_saved_*` of its nodes), so it does not depend on the architecture. Then the sparse linear refers to these
tensors, which takes no memory, and its backward makes x again from them, only those columns that have blocks.

Elsewhere x itself is kept, by reference: it takes no memory where another layer keeps it too (the output of attention),
and once the memory of x where it does not, however many linears share it (query, key and value). That is

- where x is no such product, or where nothing before x asks for a gradient: in the lowest layer with blocks;
- under hooks on saved tensors: activation checkpointing keeps neither, and offloading may move x, not look into others;
- under torch.compile, which decides by itself what to compute again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from smt_trainer.model.sharded import is_partitioned


class KeptInput(NamedTuple):
    """An input x [..., I] as what elementwise steps make of kept tensors; x itself where there is no step.

    Attributes:
        tensors: each [..., I], [..., 1], [I] or a scalar.
        steps: they begin with the first tensor. A dtype casts, "mul" and "sub" take the next tensor, and "affine"
            multiplies by the next one and adds the one after.
    """

    tensors: tuple[Tensor, ...]
    steps: tuple[str | torch.dtype, ...] = ()

    def columns(self, start: int, length: int) -> Tensor:
        """Columns `start` to `start + length` of x [T, I] over its flattened tokens."""
        x, *others = (_columns(tensor, start, length) for tensor in self.tensors)
        for step in self.steps:
            if step == "mul":
                x = x * others.pop(0)
            elif step == "sub":
                x = x - others.pop(0)
            elif step == "affine":
                weight, bias = others.pop(0), others.pop(0)
                x = torch.addcmul(bias, x, weight)
            else:
                x = x.to(step)
        return x


def _columns(tensor: Tensor, start: int, length: int) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor
    return flat if flat.ndim == 0 or flat.shape[-1] == 1 else flat.narrow(-1, start, length)


def find_origin(x: Tensor) -> KeptInput | None:
    """The tensors that autograd keeps anyway and that x can be made of; None where there are none."""
    if torch.compiler.is_compiling() or x.grad_fn is None or _saved_tensors_are_hooked():
        return None
    origin = _trace(x.grad_fn)
    # ZeRO-3 empties its parameters between uses.
    if origin is None or not all(_is_aligned(each, x) and not is_partitioned(each) for each in origin.tensors):
        return None
    return origin


def _trace(node: Node | None) -> KeptInput | None:
    """The outcome of a node of autograd's graph, from what the nodes up to it keep."""
    match type(node).__name__:
        case "ToCopyBackward0":
            origin = _trace(node.next_functions[0][0])
            return origin and KeptInput(origin.tensors, (*origin.steps, node._input_metadata[0].dtype))
        case "MulBackward0":
            first, second = node._saved_self, node._saved_other
            if first is not None and second is not None:
                return KeptInput((first, second), ("mul",))
            kept, (other, _) = (second, node.next_functions[0]) if first is None else (first, node.next_functions[1])
            origin = _trace(other)
            return origin and KeptInput((*origin.tensors, kept), (*origin.steps, "mul"))
        case "NativeLayerNormBackward0":
            return _layer_norm(node)
    return None


def _layer_norm(node: Node) -> KeptInput | None:
    h, mean, rstd, weight, bias = (
        getattr(node, f"_saved_{name}") for name in ("input", "result1", "result2", "weight", "bias")
    )
    # In half precision throughout, mean and rstd are kept rounded.
    if len(node._saved_normalized_shape) != 1 or weight is None or bias is None or mean.dtype.itemsize < 4:
        return None
    return KeptInput((h, mean, rstd, weight, bias), ("sub", "mul", "affine", node._input_metadata[0].dtype))


def _is_aligned(tensor: Tensor, x: Tensor) -> bool:
    """Whether a tensor meets x [..., I] token by token: it is [..., I], [..., 1], [I] or a scalar."""
    if tensor.ndim <= 1:
        return tensor.ndim == 0 or tensor.shape[0] in (1, x.shape[-1])
    return tensor.shape[:-1] == x.shape[:-1] and tensor.shape[-1] in (1, x.shape[-1])


def _saved_tensors_are_hooked() -> bool:
    """Whether hooks take hold of what is saved for backward now. torch has no public way to ask."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
