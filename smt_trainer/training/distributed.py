"""What FSDP2 and DeepSpeed need from the trainer, beyond what accelerate does for any model.

FSDP2    The warm-up runs on a copy of the model, which accelerate shards and which is dropped afterwards. A sharded
         model cannot be given other parameters, so the original is rewritten unsharded; the main loop shards it.
ZeRO     The warm-up runs on the bare model, before DeepSpeed's engine exists. With ZeRO-3 the weights may already be
         partitioned; such a model needs an existing selection, or a score without a warm-up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from smt_trainer.scores.preserved import frozen
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import get_state, set_state
from smt_trainer.training.loss_scale import LossScale

# Whether FSDP2 can use zeros as gradients of parameters that a rank has not used: experts without a token.
KNOWS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def is_sharding(accelerator: Accelerator) -> bool:
    """Return whether accelerate will shard the model or its optimizer over ranks."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


@contextlib.contextmanager
def warmup_model(model: nn.Module, accelerator: Accelerator) -> Generator[nn.Module]:
    """Yield the model for the warm-up: the model itself on its device, or under FSDP2 a sharded copy of it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.to(accelerator.device)
        yield model
        return
    probe = copy.deepcopy(model)
    with frozen(probe):
        # accelerate shards a model only together with its optimizer.
        probe, _ = accelerator.prepare(probe, torch.optim.SGD([next(probe.parameters())], lr=0.0))
        if KNOWS_UNUSED:
            probe.set_reduce_scatter_unused_params(True)
        try:
            yield probe
        finally:
            accelerator.free_memory()


def has_weights(accelerator: Accelerator) -> bool:
    """Return whether this rank has the base weights before sharding; with `cpu_ram_efficient_loading`, only the first
    rank has."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return accelerator.is_main_process or plugin is None or not plugin.cpu_ram_efficient_loading


def bare_autocast(accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """Return the main loop's mixed precision for an unprepared model; a copy sharded by FSDP2 has its own."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return contextlib.nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        return torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None)
    return accelerator.autocast()


@contextlib.contextmanager
def bare_backward(accelerator: Accelerator, scale: LossScale | None, needed: bool = True) -> Generator[None]:
    """Make `accelerator.backward` work for an unprepared model within this context.

    It uses the warm-up's own loss scale, if there is one, and no DeepSpeed engine, which does not exist yet. If only
    forward is needed, it does nothing.
    """
    if needed and scale is None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    accelerator.backward = scale.backward if scale else lambda loss, **_: loss.backward() if needed else None
    try:
        yield
    finally:
        del accelerator.backward


def prepare_for_sharding(model: nn.Module, accelerator: Accelerator) -> None:
    """Prepare a rewritten model for what accelerate and DeepSpeed do with its state dict; all ranks call this."""
    # Only the first rank is sure to have the base weights, from which the fingerprint is computed.
    fingerprint = broadcast_object_list([get_state(model).fingerprint])[0]
    set_state(model, replace(get_state(model), fingerprint=fingerprint))
    for _, linear in block_modules(model):
        # accelerate treats everything in the state dict as a sharded parameter.
        linear.register_buffer("block_indices", linear.block_indices, persistent=False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and not hasattr(model, "_smt_loads_trained_only"):
        model.register_load_state_dict_post_hook(_expect_trained_only)
        model._smt_loads_trained_only = True  # pyrefly: ignore[bad-argument-type]  # as in `set_state`


def _expect_trained_only(model: nn.Module, keys) -> None:
    """Report only trained parameters as missing: DeepSpeed's checkpoints hold no frozen ones."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


def save_optimizer(accelerator: Accelerator, optimizer, engine, folder: str) -> None:
    """Write a sharded run's optimizer state for a checkpoint, without frozen weights; all ranks call this."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, engine, folder)
