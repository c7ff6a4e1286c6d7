"""Estimate what a run takes, from the model's configuration alone: memory, FLOPs and size of the delta; and what LoRA
and full fine-tuning would take.

The model is built without values (`without_values.py`), and the cost of a step is counted on it (`cost.py`).

LoRA has adapters of one rank r on all targets, with r (O + I) weights for each [O, I]; r is such that LoRA trains as
many weights as SMT. On an embedding they look tokens up, and leave a tied head alone, as PEFT's do. A write-back reads
n m masters, writes as many weights and keeps nothing, for n blocks of m weights. The delta holds n m weights in the
model's dtype, and 8 bytes a block for its position.

With `bits`, SMT, its warm-up and LoRA use a base quantised to 4 or 8 bits (`quantised.py`); full fine-tuning does not.
Masters, adapters and everything else stay the same, and there is no write-back: each product puts the blocks into its
own dense copy of the weight.

The estimate is approximate. It assumes that no sequence is padded (with padding, attention saves a mask [batch, seq,
seq] in each layer), that attention is fused and its FLOPs are those of all pairs of tokens, that blocks lie at random
places (which matters little), and that warm-up sums stay on the device even if `accumulator_device` may move them to
the CPU. It leaves out the memory of the device's runtime and kernels, and what the allocator rounds up or cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smt_trainer.config import SCORES, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.estimation.adapters import equal_rank, with_adapters
from smt_trainer.estimation.cost import Cost, Step, bytes_of, tensors_of, warmup_cost
from smt_trainer.estimation.quantised import QuantisedBase
from smt_trainer.estimation.without_values import builder, without_linear_weights
from smt_trainer.model.base import base_name
from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.kinds import pick_targets
from smt_trainer.model.targets import find_targets
from smt_trainer.model.whole import find_whole, get_whole
from smt_trainer.scores import make_scorer
from smt_trainer.selection.block_scores import BlockScores
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.selection.dependencies import find_dependencies
from smt_trainer.selection.given import resolve_selection
from smt_trainer.sparse.convert import convert_modules
from smt_trainer.sparse.fit import match_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from smt_trainer.model.kinds import Target

POSITION_BYTES = 8


@dataclass(frozen=True)
class Estimate:
    """What an SMT run takes on each device, and what LoRA and full fine-tuning would take.

    A `Cost` is in bytes on each device, and in FLOPs. Since the warm-up ends before training begins, a run needs the
    larger of the peaks of `smt` and `warmup`, which is `peak`.

    Attributes:
        selection: as many blocks as the run will choose, at random places unless the configuration names them.
        smt: a step of SMT.
        warmup: a step of the warm-up; None if the configuration needs no warm-up.
        lora: a step of LoRA with `lora_rank`.
        full: a step of full fine-tuning, all in the weights' dtype, AdamW's moments included.
        lora_rank: the rank at which LoRA trains about as many parameters as SMT, at least 1.
        accumulators: score -> bytes of its warm-up sums, on all devices together; of `qm_taylor`, for one class.
        write_back: bytes read and written on each device after each step; 0 on a quantised base.
        delta: bytes on disk of the saved tensors, without their names and the manifest.
    """

    selection: BlockSelection
    smt: Cost
    warmup: Cost | None
    lora: Cost
    full: Cost
    lora_rank: int
    accumulators: dict[str, int]
    write_back: int
    delta: int

    @property
    def peak(self) -> int:
        """The bytes that a run needs on each device: the larger peak of warm-up and training."""
        return max(self.smt.peak, self.warmup.peak if self.warmup else 0)


def estimate(
    model: str | Path | PretrainedConfig,
    config: SMTConfig,
    *,
    batch: int = 1,
    seq: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    ranks: int = 1,
    zero_stage: int = 0,
    bits: int | None = None,
) -> Estimate:
    """Estimate what training a causal language model of transformers takes; load only its configuration.

    Args:
        model: hub name, folder with a `config.json`, or a configuration.
        config: what to train and how to choose it.
        batch: sequences that a device processes at a time.
        seq: tokens per sequence.
        dtype: of the weights, and of forward and backward, also where the base is quantised.
        checkpointing: recompute the activations of each layer in backward.
        ranks: number of devices.
        zero_stage: 0 for DDP, 1, 2, or 3 (also for FSDP2).
        bits: 4 or 8 to quantise the frozen base of SMT and LoRA to NF4 or LLM.int8; None to keep it in `dtype`.

    Raises:
        SMTError: a size is below 1, or `zero_stage` or `bits` is none of the above or they exclude each other; there is
            no such model, it cannot run on the meta device, or the configuration does not fit it or chooses from
            convolutions or experts, or from embeddings under ZeRO-3.
    """
    for name, value in {"batch": batch, "seq": seq, "ranks": ranks}.items():
        if value < 1:
            raise SMTError(f"{name} must be at least 1, got {value}.")
    if zero_stage not in range(4):
        raise SMTError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage}.")
    if bits is not None and zero_stage == 3:
        raise SMTError("a quantised base cannot be sharded over ranks; expected zero_stage 0, 1 or 2 with bits, got 3.")
    build = builder(model, dtype)
    plain = build()
    base = QuantisedBase.of(plain, bits)
    selection = _choose(plain, config, build)
    targets = pick_targets(plain, selection.grids)
    _refuse_kinds(targets, zero_stage)
    whole = find_whole(plain, config, selection.block_indices)
    base.refuse_whole(whole)
    rank = equal_rank(selection)
    step = Step(batch, seq, checkpointing, ranks, zero_stage, base, dense=bytes_of(tensors_of(plain)))
    scorers = {
        score: make_scorer(targets, selection.grids, replace(config, score=score, accumulator_device="device"))
        for score in SCORES
    }
    for scorer in scorers.values():
        scorer.begin_batch({"labels": torch.zeros(batch, dtype=torch.long)})
    stored = sum(bytes_of(_parts(plain, name)) for name in whole)
    master_dtype, trained = getattr(torch, config.master_dtype), selection.trainable_parameters
    return Estimate(
        selection,
        smt=step.cost(convert_modules(build(), selection, whole, master_dtype)),
        warmup=warmup_cost(plain, scorers[config.score], config, step),
        lora=step.cost(with_adapters(build(), selection, whole, rank)),
        full=replace(step, base=QuantisedBase()).cost(build()),
        lora_rank=rank,
        accumulators={score: bytes_of(scorer.statistics()) for score, scorer in scorers.items()},
        write_back=0 if bits else (master_dtype.itemsize + dtype.itemsize) * trained,
        delta=dtype.itemsize * trained + POSITION_BYTES * selection.num_blocks + stored,
    )


def _choose(model: nn.Module, config: SMTConfig, build: Callable[..., nn.Module]) -> BlockSelection:
    """Return the configured selection, or as many blocks as configured at random places."""
    if config.selection is not None:
        selection = resolve_selection(config.selection, config, model)
        match_targets(model, selection)
        return selection
    dependencies = None
    if config.train_dependents:
        dependencies = find_dependencies(without_linear_weights(build), config, find_targets(model, config))
    candidates = find_candidates(model, config, dependencies)
    targets = pick_targets(model, candidates.grids)
    scores = make_scorer(targets, candidates.grids, replace(config, score="random")).scores()
    return BlockScores.of_candidates(candidates, scores, config, base_name(model)).select()


def _refuse_kinds(targets: Mapping[str, Target], zero_stage: int) -> None:
    """Raise `SMTError` if a target is of a kind whose cost is not estimated, or not under ZeRO-3."""
    for name, target in targets.items():
        if isinstance(target, ExpertMatrix):
            raise SMTError(
                f"`{name}` gets as many tokens as a router sends to it, which depends on values that no estimate has. "
                "Estimate the attention alone, target_modules='attention'; experts add their blocks, gradients and "
                "optimizer state."
            )
        if is_convolution(target):
            raise SMTError(
                f"`{name}` is a convolution, and the cost of training blocks in convolutions is not estimated. Leave "
                "them out of target_modules."
            )
        if is_embedding(target) and zero_stage == 3:
            raise SMTError(
                f"`{name}` is an embedding, and the cost of training its blocks under ZeRO-3 is not "
                "estimated. Choose zero_stage 0, 1 or 2, or leave it out of target_modules."
            )


def _parts(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Return the tensors of a module or bias that is trained whole."""
    whole = get_whole(model, name)
    return iter([whole]) if isinstance(whole, Tensor) else tensors_of(whole)
