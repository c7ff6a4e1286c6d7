"""What FSDP2 and DeepSpeed need of the trainer, beyond what accelerate does for any model.

FSDP2    The warm-up runs sharded, on a copy of the model that accelerate shards and that is dropped afterwards: the
         parameters of a sharded model are fixed, so the original is rewritten whole and sharded by the main loop.
ZeRO     The warm-up runs on the bare model, before DeepSpeed has its engine. With ZeRO-3 the weights may be
         partitioned by then; such a model takes a selection that was made before, or a score without a warm-up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, save_fsdp_optimizer
from torch import nn

from smt_trainer.scores.collect import LossScale, frozen
from smt_trainer.sparse.linear import smt_linears


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether accelerate will spread the model or its optimizer over ranks."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


@contextlib.contextmanager
def warmup_model(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """The model on which the warm-up runs: the model itself on its device, or under FSDP2 a sharded copy of it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.to(accelerator.device)
        yield model
        return
    probe = copy.deepcopy(model)
    with frozen(probe):
        # accelerate shards a model together with an optimizer of it only.
        probe, _ = accelerator.prepare(probe, torch.optim.SGD([next(probe.parameters())], lr=0.0))
        try:
            yield probe
        finally:
            accelerator.free_memory()


def has_weights(accelerator: Accelerator) -> bool:
    """Whether this rank has the base weights before the model is sharded: all have, or only the first one."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return accelerator.is_main_process or plugin is None or not plugin.cpu_ram_efficient_loading


def bare_autocast(accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """The mixed precision of the main loop, for a model that was not prepared; a copy sharded by FSDP2 has it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return contextlib.nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        return torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None)
    return accelerator.autocast()


@contextlib.contextmanager
def bare_backward(accelerator: Accelerator, scale: LossScale | None, needed: bool = True) -> Iterator[None]:
    """`accelerator.backward` for a model that was not prepared: with the warm-up's own loss scale, and without
    DeepSpeed's engine, which there is none of yet; nothing where only forward is `needed`."""
    if needed and scale is None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    accelerator.backward = scale.backward if scale else lambda loss, **_: loss.backward() if needed else None
    try:
        yield
    finally:
        del accelerator.backward


def prepare_for_sharding(model: nn.Module, accelerator: Accelerator) -> None:
    """Make a rewritten model fit what accelerate and DeepSpeed do with a state dict; all ranks call this."""
    # Only the first rank may have the base weights that the fingerprint is of.
    fingerprint = broadcast_object_list([model.smt_state.fingerprint])[0]
    model.smt_state = replace(model.smt_state, fingerprint=fingerprint)
    for _, layer in smt_linears(model):
        # accelerate takes all that is in the state dict for sharded parameters.
        layer.register_buffer("block_indices", layer.block_indices, persistent=False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and not hasattr(model, "_smt_loads_trained_only"):
        model.register_load_state_dict_post_hook(_expect_trained_only)
        model._smt_loads_trained_only = True


def _expect_trained_only(model: nn.Module, keys) -> None:
    """DeepSpeed's checkpoints hold what is trained; what is frozen is there already."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


def save_optimizer(accelerator: Accelerator, optimizer, engine: nn.Module, folder: str) -> None:
    """Write the optimizer's state of a sharded run for a checkpoint, without frozen weights; all ranks call this."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, engine, folder)
