"""Which kinds of weights are trained where FSDP2 or DeepSpeed shards a model over ranks.

               linears, convolutions, embeddings   experts   new tokens   quantised
    FSDP2      trained                             trained   refused      refused
    ZeRO-1, 2  trained                             trained   trained      refused
    ZeRO-3     trained                             refused   refused      refused

ZeRO-3 gathers the parameters of a module when the module is called. It gathers a 3-D parameter of experts only after
our hooks have read it, and never gathers the experts' blocks, which lie in modules that are not called. Experts that
are modules in a list are called on some ranks only, and the other ranks never take part in the gathering. Before torch
2.13, FSDP2 adds up gradients of different experts in the warm-up. Rows of new tokens are rows of embeddings, but
sharding has not been tried with a base that lacks them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.experts import find_expert
from smt_trainer.model.listed_experts import expert_lists
from smt_trainer.model.quantised import quantization_of
from smt_trainer.training.distributed import KNOWS_UNUSED, is_sharding


def refuse_sharded_quantised(accelerator: Accelerator, model: nn.Module | None) -> None:
    """Raise `SMTError` if a quantised model would be sharded over ranks."""
    if model is not None and quantization_of(model) is not None and is_sharding(accelerator):
        raise SMTError(
            "the base is quantised, and FSDP2 and DeepSpeed cut and cast weights as if they were plain. Use DDP, or "
            "load the base unquantised."
        )


def refuse_partitioned_experts(accelerator: Accelerator, model: nn.Module, targets: Iterable[str]) -> None:
    """Raise `SMTError` if ZeRO-3, or FSDP2 of an older torch, would shard experts that are targets."""
    targets = list(targets)
    expert = next((name for name in targets if find_expert(model, name) is not None), None)
    if expert is not None and _partitions(accelerator):
        raise SMTError(
            f"`{expert}` lies in a parameter with all experts, whose products cannot be watched where ZeRO-3 "
            "partitions it. Use FSDP2, DDP or ZeRO-1 or 2, or leave the experts out: target_modules='attention'."
        )
    lists = tuple(f"{name}." for name, _, _ in expert_lists(model))
    listed = next((name for name in targets if name.startswith(lists)), None)
    if listed is not None and _partitions(accelerator):
        raise SMTError(
            f"`{listed}` belongs to an expert in a list, which a router calls on some ranks only, so ZeRO-3 would wait "
            "for the others forever. Use FSDP2, DDP or ZeRO-1 or 2, or leave the experts out: "
            "target_modules='attention'."
        )
    if listed is not None and accelerator.distributed_type == DistributedType.FSDP and not KNOWS_UNUSED:
        raise SMTError(
            f"`{listed}` belongs to an expert in a list, which a router calls on some ranks only, and FSDP2 of torch "
            f"{torch.__version__} adds up gradients of different experts. Use torch 2.13 or newer, or DDP, or leave "
            "the experts out: target_modules='attention'."
        )


def refuse_sharded_tokens(accelerator: Accelerator, modules: Collection[str]) -> None:
    """Raise `SMTError` if rows of new tokens in some modules would lie in weights that are sharded over ranks."""
    if modules and (accelerator.distributed_type == DistributedType.FSDP or _partitions(accelerator)):
        raise SMTError(
            f"`{next(iter(modules))}` has rows of new tokens, which are not known to be exact where FSDP2 or ZeRO-3 "
            "shards weights over ranks. Use DDP or ZeRO-1 or 2, or train the whole module: modules_to_save."
        )


def _partitions(accelerator: Accelerator) -> bool:
    """Return whether ZeRO-3 partitions the weights."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
