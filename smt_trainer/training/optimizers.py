"""Refuse optimizers that cannot train blocks."""

from __future__ import annotations

import logging

from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import is_smt_model

logger = logging.getLogger(__name__)

OPTIMIZERS_OF_BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged_", "rmsprop_bnb")
# Optimizers that keep their own map of the model's matrices, or swap weights outside forward.
REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")


def refuse_optim(trainer) -> None:
    """Raise `SMTError` if `TrainingArguments.optim` names an optimizer that cannot step blocks, or not sharded ones."""
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optim.startswith(REFUSED_OPTIMIZERS):
        raise SMTError(
            f"optim={optim!r} works on whole matrices or swaps weights outside forward, so it cannot train "
            "blocks. Use adamw_torch, adamw_torch_fused, adamw_bnb_8bit, adafactor, sgd or lion."
        )
    if optim.startswith(OPTIMIZERS_OF_BITSANDBYTES) and trainer.accelerator.distributed_type == DistributedType.FSDP:
        raise SMTError(
            f"optim={optim!r} is an optimizer of bitsandbytes, which cannot step what FSDP2 shards. Use adamw_torch, "
            "or DDP."
        )


def refuse_bound_optimizer(trainer) -> None:
    """Raise `SMTError` if the trainer holds an optimizer or a scheduler of parameters that are not trained.

    Those of its own earlier run, or over the blocks of a rewritten model, are allowed.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    if scheduler is not None and not isinstance(scheduler, DeepSpeedSchedulerWrapper):
        _refuse_bound(trainer.model, scheduler.optimizer)
    # DeepSpeed's optimizer holds flat copies of the parameters, and only DeepSpeed makes one.
    if optimizer is not None and not isinstance(optimizer, DeepSpeedOptimizerWrapper):
        _refuse_bound(trainer.model, optimizer)


def _refuse_bound(model: nn.Module, optimizer) -> None:
    trained = {id(one) for one in model.parameters() if one.requires_grad} if is_smt_model(model) else set()
    stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if not (stepped and stepped <= trained):
        raise SMTError(
            "the trainer holds an optimizer or scheduler (from optimizers=, create_optimizer() or an assignment) that "
            "is bound to parameters from before the blocks were chosen. Pass optimizer_cls_and_kwargs=(class, kwargs), "
            "or set TrainingArguments.optim and lr_scheduler_type; leave trainer.optimizer and trainer.lr_scheduler at "
            "None."
        )


def refuse_useless_optimizer(model: nn.Module, optimizer) -> None:
    """Raise `SMTError` if the optimizer of a run holds none of the model's blocks; warn if it lacks some.

    DeepSpeed's holds flat copies and is left out.
    """
    if optimizer is None or isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return
    stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    trained = {f"{name}.blocks": one.blocks for name, one in block_modules(model) if one.blocks.requires_grad}
    lacking = [name for name, blocks in trained.items() if id(blocks) not in stepped]
    if trained and len(lacking) == len(trained):
        raise SMTError(
            f"the optimizer holds none of the trained blocks, such as `{lacking[0]}`, so nothing would be learned. If "
            "your create_optimizer picks parameters by name, include those that end in `.blocks`, or all that require "
            "a gradient."
        )
    if lacking:
        logger.warning(
            "The optimizer lacks %d of %d blocks' parameters, such as `%s`: they will not be trained.",
            len(lacking),
            len(trained),
            lacking[0],
        )
