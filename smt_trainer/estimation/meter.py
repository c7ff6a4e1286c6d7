"""Count what a training step takes while it runs: bytes of the tensors alive, and FLOPs.

A step on the meta device, where tensors have shapes but no values, gives the same counts as one on a real device. Three
differences are corrected: attention would split into products of whole [seq, seq] matrices, autocast does not know the
device, and no value can be read. Models read values to see whether a sequence is padded or packed; the answer is always
that none is.

A tensor's bytes are those of its storage. They count once for all its views, from the operation that makes it until the
last reference goes. Each operation that reads a quantised weight adds a dense copy of it while it runs. The workspace
of kernels and the rounding of the allocator are not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu


def attention_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """FLOPs of softmax(q k^T) v, for q [B, H, S, D], k [B, ., T, D], v [B, ., T, E]: two for each pair and feature."""
    batch, heads, tokens, width = q.shape
    return 2 * batch * heads * tokens * k.shape[-2] * (width + v.shape[-1])


def attention_backward_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """FLOPs of the backward of attention: the scores again, and the gradients of q, k, v and of the probabilities."""
    batch, heads, tokens, width = q.shape
    return 2 * batch * heads * tokens * k.shape[-2] * (3 * width + 2 * v.shape[-1])


FLOPS = flop_registry | {
    FUSED: lambda q, k, v, *_, **__: attention_flops(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dy, q, k, v, *_, **__: attention_backward_flops(q, k, v)
    ),
}


@dataclass(frozen=True)
class Reading:
    """What one step took, beyond what existed before it.

    Attributes:
        activations: bytes alive when the output embeddings are reached: what is kept for backward, and their input.
        loss: the most bytes alive from then until backward gets back there, on top of `activations`.
        gradients: bytes of the gradients at the end.
        peak: the most bytes alive at one time.
        flops: FLOPs of the matrix products of forward and backward, two for each multiply-add.
    """

    activations: int
    loss: int
    gradients: int
    peak: int
    flops: int


def read_step(
    model: PreTrainedModel,
    batch: int,
    seq: int,
    *,
    beside: Iterable[Tensor] = (),
    quantised: Iterable[Tensor] = (),
    gradient_share: float = 1.0,
) -> Reading:
    """Run forward and backward of one step of a causal language model, and count what it takes.

    Args:
        model: of transformers, on the meta device or a real one; its trained parameters have gradients afterwards.
        batch: number of sequences.
        seq: tokens per sequence.
        beside: tensors that existed before, other than the model's own.
        quantised: weights of the model that each operation dequantises for itself.
        gradient_share: the share of a gradient that stays once it is complete.
    """
    before = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), *beside]]
    alive = _Alive(before, {_key(weight.untyped_storage()): weight.nbytes for weight in quantised})
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: alive.shrink(parameter.grad, gradient_share))
        for parameter in model.parameters()
        if parameter.requires_grad and gradient_share < 1
    ]

    def reach_head(_, inputs: tuple[Tensor, ...]) -> None:
        alive.start_phase()
        activations.append(alive.now)
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: alive.start_phase())

    activations: list[int] = []
    # pyrefly: ignore[missing-attribute]  # a causal language model has output embeddings
    handles.append(model.get_output_embeddings().register_forward_pre_hook(reach_head))
    try:
        with _like_elsewhere(), alive:
            tokens = torch.zeros(batch, seq, dtype=torch.long, device=before[0].device)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            gradients = alive.bytes_of(_key(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None)
    finally:
        for handle in handles:
            handle.remove()
    return Reading(activations[0], alive.peaks[1] - activations[0], gradients, max(alive.peaks), alive.flops)


class _Alive(TorchDispatchMode):
    """Counts FLOPs, and the bytes of the storages made while it is active, with their peak in each phase."""

    def __init__(self, before: list[UntypedStorage], quantised: dict[int, int]) -> None:
        super().__init__()
        self.before, self.quantised = before, quantised
        self.sizes = dict.fromkeys(map(_key, before), 0)
        self.now, self.peaks, self.flops = 0, [0], 0

    def __torch_dispatch__(self, func, types, args: tuple = (), kwargs=None):
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor.untyped_storage()) not in self.sizes:
                self._add(tensor.untyped_storage())
        self.peaks[-1] = max(self.peaks[-1], self.now + self._dequantised((args, kwargs)))
        return result

    def _dequantised(self, arguments) -> int:
        """Return the bytes of the weights among the arguments of an operation that it has to dequantise."""
        if not self.quantised:
            return 0
        keys = {_key(each.untyped_storage()) for each in tree_leaves(arguments) if isinstance(each, Tensor)}
        return sum(self.quantised.get(key, 0) for key in keys)

    def _add(self, storage: UntypedStorage) -> None:
        self._resize(_key(storage), storage.nbytes())
        weakref.finalize(storage, self._forget, _key(storage))

    def _forget(self, key: int) -> None:
        self._resize(key, 0)
        del self.sizes[key]

    def _resize(self, key: int, size: int) -> None:
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[-1] = max(self.peaks[-1], self.now)

    def start_phase(self) -> None:
        """Begin a new phase, with its own peak."""
        self.peaks.append(self.now)

    def shrink(self, tensor: Tensor, share: float) -> None:
        """From now on, count only a share of a tensor."""
        self._resize(_key(tensor.untyped_storage()), round(share * tensor.nbytes))

    def bytes_of(self, keys: Iterable[int]) -> int:
        """Return the bytes of those storages that were made here and are still alive."""
        return sum(self.sizes.get(key, 0) for key in keys)


def _key(storage: UntypedStorage) -> int:
    """Return a key that tells storages apart while they are alive."""
    return storage._cdata


@contextlib.contextmanager
def _like_elsewhere() -> Generator[None]:
    """Within this context, run attention as one operation on the meta device, and report autocast as off there."""
    originals = attention, autocasts = F.scaled_dot_product_attention, torch.is_autocast_enabled

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not query.is_meta or query.shape[-1] != value.shape[-1]:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.logical_not().to(query.dtype)
        return FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    def autocasts_anything(*device_type):
        return device_type != ("meta",) and autocasts(*device_type)

    # pyrefly: ignore[bad-assignment]  # any number of arguments is more than the original takes
    F.scaled_dot_product_attention, torch.is_autocast_enabled = attend, autocasts_anything
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.is_autocast_enabled = originals
