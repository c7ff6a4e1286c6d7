"""Refuse what SMTTrainer cannot train with, as early as it can be seen."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.experts import expert_stacks, matrices_of
from smt_trainer.model.newly_initialised import new_rows
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.sharded import full_shape, is_partitioned
from smt_trainer.model.targets import narrow, refuse_adapters
from smt_trainer.scores import SCORERS
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import get_state, is_smt_model
from smt_trainer.training.class_column import refuse_missing_column
from smt_trainer.training.optimizers import refuse_bound_optimizer, refuse_optim
from smt_trainer.training.preserved import rng_preserved
from smt_trainer.training.read_once import refuse_data_read_once
from smt_trainer.training.sharded_kinds import refuse_sharded_quantised
from smt_trainer.training.tensor_parallel import refuse_unshown_parallelism
from smt_trainer.training.vllm_weights import knows_sync


def refuse_unusable(trainer) -> None:
    """Raise `SMTError` for an argument, a model or a launch setup with which blocks cannot be trained.

    Args:
        trainer: an `SMTTrainerMixin` whose base trainer has read its arguments.
    """
    config = trainer.smt_config
    scorer = SCORERS[config.score]
    needs_warmup = config.selection is None and scorer.needs_warmup and not is_smt_model(trainer.model)
    if trainer.model is not None:
        refuse_adapters(trainer.model)
    refuse_bound_optimizer(trainer)
    refuse_optim(trainer)
    _refuse_data_parallel(trainer.args.n_gpu)
    refuse_unshown_parallelism(trainer)
    _refuse_fsdp1(trainer.accelerator)
    _refuse_partitioned_weights(trainer.model, needs_warmup)
    refuse_sharded_quantised(trainer.accelerator, trainer.model)
    _refuse_unfollowed_experts(trainer)
    _refuse_hidden_weights(trainer.accelerator)
    _refuse_copies_by_name(trainer.args)
    _refuse_vllm(trainer, needs_warmup)
    if needs_warmup:
        refuse_data_read_once(trainer.train_dataset)
        with rng_preserved():
            # Reading the first example may draw random numbers.
            refuse_missing_column(trainer.train_dataset, scorer.class_column(config))


def refuse_resized(model: nn.Module) -> None:
    """Raise `SMTError` if an embedding was resized after its blocks were taken."""
    for name, linear in block_modules(model):
        found, expected = full_shape(linear.parameter), linear.grid.stored_shape
        if linear.grid.embedding and found != expected:
            raise SMTError(
                f"`{name}` was resized from {expected[0]} to {found[0]} rows after its blocks were taken. Resize the "
                "model first, as it was loaded, and choose the tokens then: select_tokens(model, ids)."
            )


def refuse_other_blocks(model: nn.Module, config: SMTConfig, given: BlockSelection | None) -> None:
    """Raise `SMTError` if a rewritten model trains other blocks than a configuration, or its selection, asks for."""
    selection = get_state(model).selection
    differences = (given.config if given else config).differences(selection.config)
    if given:
        new = new_rows(model)
        if _listed(given, new) != _listed(selection, new):
            differences.append("selection: other blocks")
    if differences:
        raise SMTError(
            f"this model trains blocks already, which were chosen under another smt_config (ours first: "
            f"{'; '.join(differences)}). Leave smt_config out to go on training them; to choose others, load the "
            "base again or, to build on what was trained, the checkpoint that merge_and_save writes."
        )


def _listed(selection: BlockSelection, new: Mapping[str, range]) -> dict[str, list]:
    """Return the blocks of each module, without those in rows of new tokens, which training adds by itself."""
    listed = {}
    for name, indices in selection.block_indices.items():
        rows, height = new.get(f"{name}.weight", range(0)), selection.grids[name].block_rows
        if blocks := [[row, column] for row, column in indices.tolist() if row * height not in rows]:
            listed[name] = blocks
    return listed


def _refuse_unfollowed_experts(trainer) -> None:
    """Raise `SMTError` if matrices of experts are targets and torch.compile hides their products."""
    model, config = trainer.model, trainer.smt_config
    if model is None or is_smt_model(model) or not trainer.args.torch_compile:
        return
    names = [name for stack in expert_stacks(model) for name in matrices_of(*stack)]
    given = config.selection if isinstance(config.selection, BlockSelection) else None
    asked = narrow(names, config) if given is None else [name for name in names if name in given.grids]
    if asked:
        raise SMTError(
            f"`{asked[0]}` is the matrix of an expert, whose products are watched as Python runs them, which "
            "torch_compile=True prevents. Leave out torch_compile, or the experts: target_modules='attention'."
        )


def refuse_misplaced(kind: type, mixin: type) -> None:
    """Raise `SMTError` if a subclass of a mixin has a Trainer in front of it, whose methods would hide the mixin's."""
    for base in kind.__mro__:
        if base is mixin:
            return
        if issubclass(base, Trainer) and not issubclass(base, mixin):
            raise SMTError(
                f"{kind.__name__} has {base.__name__} in front of {mixin.__name__}, so it would train all weights. "
                f"Write class {kind.__name__}({mixin.__name__}, {base.__name__})."
            )


def _refuse_data_parallel(visible_gpus: int) -> None:
    if visible_gpus > 1:
        raise SMTError(
            f"one process sees {visible_gpus} GPUs, so Trainer uses torch.nn.DataParallel. Start one process per "
            "GPU with `accelerate launch` (or torchrun), or make only one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )


def _refuse_fsdp1(accelerator: Accelerator) -> None:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise SMTError(
            "FSDP version 1 flattens parameters and cannot train blocks of frozen weights; set fsdp_version: 2 in the "
            "accelerate config, or TrainingArguments(fsdp_config={'version': 2})."
        )


def _refuse_partitioned_weights(model: nn.Module | None, needs_warmup: bool) -> None:
    if needs_warmup and model is not None and any(map(is_partitioned, model.parameters())):
        raise SMTError(
            "ZeRO-3 has already partitioned the weights, but the warm-up needs the bare model. Choose the blocks in a "
            "run without ZeRO-3 (one process, DDP, FSDP2 or ZeRO-2) and pass its smt_selection.json as "
            "SMTConfig(selection=...), or use a score without a warm-up ('magnitude', 'random')."
        )


def _refuse_hidden_weights(accelerator: Accelerator) -> None:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    on_nvme = (zero.get("offload_param") or {}).get("device") == "nvme"
    if on_nvme or zero.get("zero_quantized_weights") or zero.get("zero_hpz_partition_size", 1) > 1:
        raise SMTError(
            "ZeRO-3 keeps weights on NVMe, quantised or in secondary copies, where blocks cannot be written back. "
            "Offload parameters to the CPU, and leave out zero_quantized_weights and zero_hpz_partition_size."
        )


def _refuse_copies_by_name(args) -> None:
    """Refuse TRL's option that copies the parameters into another model, which has no blocks."""
    if getattr(args, "sync_ref_model", False):
        raise SMTError(
            "sync_ref_model=True copies parameters into a model that has no blocks; keep the reference as it is."
        )


def _refuse_vllm(trainer, needs_warmup: bool) -> None:
    """Raise `SMTError` if the trainer would send weights to vLLM that are not those of the merged model."""
    # TRL's asynchronous trainer has no use_vllm: it always sends.
    if not (getattr(trainer.args, "use_vllm", False) or hasattr(trainer, "_sync_weight")):
        return
    if not knows_sync(trainer):
        raise SMTError(
            f"{type(trainer).__name__} sends weights to vLLM in another way than by vllm_generation.sync_weights or "
            "_move_model_to_vllm, so the blocks would be lost. Generate without vLLM (use_vllm=False), or use "
            "GRPOTrainer, RLOOTrainer or OnlineDPOTrainer."
        )
    if trainer.model is not None and quantization_of(trainer.model) is not None:
        raise SMTError(
            "use_vllm=True sends weights to vLLM, and the quantised weights of this model cannot hold the trained "
            "blocks. Load the base without quantization_config, or generate without vLLM."
        )
    if needs_warmup and trainer.accelerator.distributed_type == DistributedType.FSDP:
        raise SMTError(
            "use_vllm=True with FSDP2 sends weights as sharded ones, but in the warm-up they are not sharded. Choose "
            "the blocks in an earlier run and pass its smt_selection.json as SMTConfig(selection=...)."
        )
