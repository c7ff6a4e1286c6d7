"""What the trainer does for a model that transformers cuts over ranks on loading (`DistributedConfig`).

All ranks hold all blocks and their optimizer state (`sparse/tensor_parallel.py`), so a checkpoint has what a resumed
run needs. Trainer refuses checkpoints of such models, as it expects to train the weights that are cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.sharded import is_dtensor
from smt_trainer.model.tensor_parallel import is_tensor_parallel, refuse_copied
from smt_trainer.scores import SCORERS
from smt_trainer.training.distributed import is_sharding

# torch's ring attention and DeepSpeed's Ulysses, which run on several GPUs only.
UNSHOWN = {"cp": "context parallelism (cp_size)", "sp": "sequence parallelism (sp_size)"}
# What a `DistributedConfig` may ask for in addition to `tp_size`, and to `ep_size` over the same ranks.
BESIDE = ("fsdp_size", "dp_replicate_size", "pp_size")


@contextlib.contextmanager
def admitting_checkpoints(model: Any, given: Iterable[Any]) -> Generator[None]:
    """Within this context, make Trainer's constructor accept a model that is cut over ranks, although the `given`
    arguments ask for checkpoints."""
    arguments = next((one for one in given if isinstance(one, TrainingArguments)), None)
    if arguments is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    before, arguments.save_only_model = arguments.save_only_model, True
    try:
        yield
    finally:
        arguments.save_only_model = before


@contextlib.contextmanager
def saving_gathered(model: nn.Module) -> Generator[None]:
    """Make `save_pretrained` write a state dict that is gathered already, on one rank alone, within this context."""
    config: Any = getattr(model, "config", None)
    layout = getattr(config, "distributed_config", None)
    if layout is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = layout


def refuse_unshown_parallelism(trainer) -> None:
    """Raise `SMTError` for a model that is split over ranks in a way in which blocks are not known to be exact."""
    model, arguments = trainer.model, trainer.args
    sizes: Any = arguments.parallelism_config
    for kind, name in UNSHOWN.items():
        if getattr(sizes, f"{kind}_size", 1) > 1:
            raise SMTError(
                f"parallelism_config asks for {name}, under which blocks are not known to be exact: it needs several "
                "GPUs, which the tests do not have. Use DDP, FSDP2 or ZeRO with gradient_checkpointing for long "
                "sequences, or tensor parallelism."
            )
    for part in (model, getattr(trainer, "ref_model", None)):
        if part is not None:
            refuse_copied(part)
    if model is None:
        return
    if not any(map(is_tensor_parallel, model.modules())):
        _refuse_uncut(model, max(getattr(sizes, "tp_size", 1), getattr(model, "tp_size", None) or 1))
        return
    layout: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if layout is None:
        raise SMTError(
            f"tensor parallelism cuts a model inside the {type(model).__name__}, which has no plan of its own. Pass "
            "the model that from_pretrained returned."
        )
    beside = [f"{name}={getattr(layout, name)}" for name in BESIDE if getattr(layout, name) > 1]
    beside += ["FSDP or DeepSpeed"] if is_sharding(trainer.accelerator) else []
    beside += ["a quantised base"] if quantization_of(model) is not None else []
    beside += ["torch_compile=True"] if arguments.torch_compile else []
    beside += ["use_vllm=True"] if getattr(arguments, "use_vllm", False) else []
    beside += _beside_config(trainer.smt_config)
    if beside:
        raise SMTError(
            f"tensor parallelism cuts the model, and together with {beside[0]} blocks are not known to be exact. Leave "
            "that out, or load the model whole, without distributed_config."
        )


def _refuse_uncut(model: nn.Module, tp_size: int) -> None:
    if getattr(model, "is_distributed_loading_by_transformers", False) or any(map(is_dtensor, model.parameters())):
        raise SMTError(
            "the model was sharded when it was loaded, but not by tensor parallelism. Load it without a "
            "distributed_config, and let accelerate shard it (FSDP2, ZeRO) after the rewrite; or load it with "
            "distributed_config=DistributedConfig(tp_size=...)."
        )
    if tp_size > 1:
        raise SMTError(
            f"tp_size={tp_size}, but no linear of the model is cut in a supported way. Load it under transformers "
            f"5.23 or newer with from_pretrained(..., distributed_config=DistributedConfig(tp_size={tp_size}))."
        )


def _beside_config(config: SMTConfig) -> list[str]:
    """Return the settings of a configuration that slices of weights do not support."""
    found = [f"score={config.score!r}"] if config.selection is None and SCORERS[config.score].needs_all_features else []
    return found + (["train_dependents=True"] if config.train_dependents else [])
