"""Estimate what a run takes, from the model's configuration alone: memory, FLOPs and size of the delta; and what LoRA
and full fine-tuning would take.

The model is built on the meta device, where a tensor has a shape but no values. It runs one step there as in training,
with its linears rewritten and its activations checkpointed or not. The cost of the step is counted, not modelled (see
`meter.py`). In bytes, for each device:

    peak         = weights + added + optimizer + largest sum of all other tensors alive at any time in the step
    weights      = the model's parameters and buffers
    added        = what stays beside them throughout: the masters of n blocks of m weights and their positions, LoRA's
                   adapters (in float32, as PEFT keeps them), or the accumulators of the warm-up
    optimizer    = AdamW: two moments in the dtype of the trained tensor, and a step count of 4 bytes a tensor
    gradients    = those at the end of backward, as large as the trained parameters
    activations  = the distinct tensors alive when the output embeddings are reached: what autograd keeps for backward
                   (with checkpointing, the inputs of the layers), and the input of the output embeddings
    loss         = what the output embeddings and the loss add: logits of T tokens x V words, also in float32 and as
                   log-probabilities, and their gradients

so peak = weights + added + optimizer + activations + loss, unless backward needs more than the loss: for its gradients
(full fine-tuning), or for the activations of the layer that it recomputes (checkpointing).

Each of R ranks has its own batch. ZeRO divides by R: the optimizer's state from stage 1 on; each gradient, once
complete, from stage 2 on; weights and added tensors in stage 3 (and FSDP2). Stage 3 gathers the weights of two layers
and of everything outside the layers. DDP (stage 0) holds the gradients a second time, in its buckets.

LoRA has adapters of one rank r on all targets, with r (O + I) weights for each [O, I]; r is such that LoRA trains as
many weights as SMT. On an embedding they look tokens up, and leave a tied head alone, as PEFT's do. A write-back reads
n m masters, writes as many weights and keeps nothing. The delta holds n m weights in the model's dtype, and 8 bytes a
block for its position.

With `bits`, SMT, its warm-up and LoRA stand on a base that is held in 4 or 8 bits (`quantised.py`); full fine-tuning
does not. Masters, adapters and all else stay as they are, and there is no write-back: each product puts the blocks into
its own dense copy of the weight.

The estimate is approximate. It assumes that no sequence is padded (with padding, attention saves a mask [batch, seq,
seq] in each layer), that attention is fused and its FLOPs are those of all pairs of tokens, that blocks lie at random
places (which matters little), and that warm-up sums stay on the device where `accumulator_device` may move them to the
CPU. It leaves out the memory of the device's runtime and kernels, and what the allocator rounds up or cannot use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from smt_trainer.config import SCORES, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.estimation.adapters import equal_rank, with_adapters
from smt_trainer.estimation.meter import read_step
from smt_trainer.estimation.quantised import QuantisedBase
from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.kinds import is_linear, named_targets
from smt_trainer.model.names import layer_index
from smt_trainer.model.targets import find_targets
from smt_trainer.model.whole import find_whole, get_whole
from smt_trainer.scores import Scorer, make_scorer
from smt_trainer.scores.collect import frozen
from smt_trainer.selection.block_scores import BlockScores, resolve_selection
from smt_trainer.selection.block_selection import BlockSelection, base_name
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.selection.dependencies import find_dependencies
from smt_trainer.sparse.convert import find_linears, rewrite

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from smt_trainer.model.kinds import Target

META = torch.device("meta")
STEP_COUNT_BYTES = 4
POSITION_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """Cost of one step on each device, in bytes except for `trainable` and `flops`; see the top of this file.

    Attributes:
        trainable: number of trained parameters; 0 in the warm-up.
        weights: the model's parameters and buffers, quantised ones with their scales.
        added: masters, adapters or accumulators.
        optimizer: AdamW's state.
        gradients: those at the end of backward, with DDP's buckets.
        activations: tensors alive when the output embeddings are reached.
        loss: the most that output embeddings and loss add to `activations`.
        peak: the most that is alive at one time.
        flops: FLOPs of forward and backward.
    """

    trainable: int
    weights: int
    added: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    peak: int
    flops: int


@dataclass(frozen=True)
class Estimate:
    """What an SMT run takes on each device, and what LoRA and full fine-tuning would take.

    Attributes:
        selection: as many blocks as the run will choose, at random places unless the configuration names them.
        smt: a step of SMT.
        warmup: a step of the warm-up; None if the configuration needs no warm-up.
        lora: a step of LoRA with `lora_rank`.
        full: a step of full fine-tuning, all in the weights' dtype.
        lora_rank: the rank at which LoRA trains about as many parameters as SMT, at least 1.
        accumulators: score -> bytes of its warm-up sums, on all devices together; of `qm_taylor`, for one class.
        write_back: bytes read and written after each step; 0 on a quantised base.
        delta: bytes of the saved tensors, without their names and the manifest.
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
        """The most bytes that warm-up or training needs on each device."""
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
        bits: 4 or 8 hold the frozen base of SMT and LoRA in NF4 or LLM.int8; None: in `dtype`.

    Raises:
        SMTError: there is no such model, it cannot run on the meta device, or the configuration does not fit it or
            chooses from convolutions or experts.
    """
    for name, value in {"batch": batch, "seq": seq, "ranks": ranks}.items():
        if value < 1:
            raise SMTError(f"{name} must be at least 1, got {value}.")
    if zero_stage not in range(4):
        raise SMTError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage}.")
    if bits is not None and zero_stage == 3:
        raise SMTError("a base in few bits is not divided over ranks; expected zero_stage 0, 1 or 2 with bits, got 3.")
    build = _builder(model, dtype)
    plain = build()
    base = QuantisedBase.of(plain, bits)
    selection = _choose(plain, config, build)
    everything = named_targets(plain)
    targets = {name: everything[name] for name in selection.grids}
    _refuse_kinds(targets, zero_stage)
    whole = find_whole(plain, config, selection.block_indices)
    base.refuse_whole(whole)
    rank = equal_rank(selection)
    step = _Step(batch, seq, checkpointing, ranks, zero_stage, base, dense=_bytes(_tensors(plain)))
    scorers = {
        score: make_scorer(targets, selection.grids, replace(config, score=score, accumulator_device="device"))
        for score in SCORES
    }
    for scorer in scorers.values():
        scorer.begin_batch({"labels": torch.zeros(batch, dtype=torch.long)})
    stored = sum(_bytes(_parts(plain, name)) for name in whole)
    master_dtype, trained = getattr(torch, config.master_dtype), selection.trainable_parameters
    return Estimate(
        selection,
        smt=step.cost(rewrite(build(), selection, whole, master_dtype)),
        warmup=_warmup_cost(plain, scorers[config.score], config, step),
        lora=step.cost(with_adapters(build(), selection, whole, rank)),
        full=replace(step, base=QuantisedBase()).cost(build()),
        lora_rank=rank,
        accumulators={score: _bytes(scorer.statistics()) for score, scorer in scorers.items()},
        write_back=0 if bits else (master_dtype.itemsize + dtype.itemsize) * trained,
        delta=dtype.itemsize * trained + POSITION_BYTES * selection.num_blocks + stored,
    )


@dataclass(frozen=True)
class _Step:
    """What all steps share, whatever is trained, as in `estimate`; `dense` is the bytes of the plain model."""

    batch: int
    seq: int
    checkpointing: bool
    ranks: int
    zero_stage: int
    base: QuantisedBase
    dense: int

    def cost(self, model: PreTrainedModel, sums: list[Tensor] | None = None) -> Cost:
        """Return the cost of one training step, or of one warm-up step if its `sums` are given."""
        if self.checkpointing:
            _checkpoint(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and sums is None]
        added = _bytes(_tensors(model)) - self.dense + _bytes(sums or [])
        quantised = self.base.hold(model)
        weights = self.dense - _bytes(quantised) + self.base.nbytes
        optimizer = 2 * _bytes(trained) + STEP_COUNT_BYTES * len(trained)
        share = [1 / self.ranks if self.zero_stage >= stage else 1 for stage in range(4)]
        kept = share[2] if sums is None else 1
        try:
            reading = read_step(
                model, self.batch, self.seq, beside=sums or [], quantised=quantised, gradient_share=kept
            )
        except Exception as error:  # a model of an odd configuration raises anything
            first_line = str(error).partition("\n")[0]
            raise SMTError(f"{type(model).__name__} cannot run on the meta device: {first_line}") from error
        buckets = _bytes(trained) if self.ranks > 1 and self.zero_stage == 0 else 0
        weights, added, optimizer = round(share[3] * weights), round(share[3] * added), round(share[1] * optimizer)
        gathered = round((1 - share[3]) * _gathered(model))
        return Cost(
            trainable=sum(parameter.numel() for parameter in trained),
            weights=weights,
            added=added,
            optimizer=optimizer,
            gradients=reading.gradients + buckets,
            activations=reading.activations,
            loss=reading.loss,
            peak=weights + added + optimizer + buckets + gathered + reading.peak,
            flops=reading.flops,
        )


def _builder(model: str | Path | PretrainedConfig, dtype: torch.dtype) -> Callable[..., PreTrainedModel]:
    """Return a function that builds the model, on the meta device unless it is given another one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(device: torch.device = META) -> PreTrainedModel:
        with device:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()

    try:
        config = AutoConfig.from_pretrained(model) if isinstance(model, (str, Path)) else model
        build()
    except Exception as error:  # an odd configuration makes transformers raise anything
        first_line = str(error).partition("\n")[0]
        raise SMTError(f"no causal language model can be built from {model}: {first_line}") from error
    return build


def _choose(model: nn.Module, config: SMTConfig, build: Callable[..., nn.Module]) -> BlockSelection:
    """Return the configured selection, or as many blocks at random places."""
    if config.selection is not None:
        selection = resolve_selection(config.selection, config, model)
        find_linears(model, selection)
        return selection
    dependencies = None
    if config.train_dependents:
        dependencies = find_dependencies(_without_linear_weights(build), config, find_targets(model, config))
    candidates = find_candidates(model, config, dependencies)
    everything = named_targets(model)
    targets = {name: everything[name] for name in candidates.grids}
    scores = make_scorer(targets, candidates.grids, replace(config, score="random")).scores()
    return BlockScores.of_candidates(candidates, scores, config, base_name(model)).select()


def _without_linear_weights(build: Callable[..., nn.Module]) -> nn.Module:
    """Build the model with values, except for the weights of its linears: the search for dependencies ignores them."""
    with init_empty_weights(include_buffers=False):
        model = build(torch.device("cpu"))
    for module in model.modules():
        if not is_linear(module):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.rand_like(parameter, device="cpu") + 0.5))
    return model


def _refuse_kinds(targets: Mapping[str, Target], zero_stage: int) -> None:
    """Raise `SMTError` if some targets are of a kind whose step is not counted, or not over ranks."""
    for name, target in targets.items():
        if isinstance(target, ExpertMatrix):
            raise SMTError(
                f"`{name}` gets as many tokens as a router sends to it, which no model without values can tell. "
                "Estimate the attention alone, target_modules='attention'; experts add their blocks, gradients and "
                "optimizer state."
            )
        if is_convolution(target):
            raise SMTError(
                f"`{name}` is a convolution, and what a step with blocks in such modules takes is not estimated. Leave "
                "them out of target_modules."
            )
        if is_embedding(target) and zero_stage == 3:
            raise SMTError(
                f"`{name}` is an embedding, and what a step with its blocks takes where ZeRO-3 shards weights is not "
                "estimated. Choose zero_stage 0, 1 or 2, or leave it out of target_modules."
            )


def _warmup_cost(model: PreTrainedModel, scorer: Scorer, config: SMTConfig, step: _Step) -> Cost | None:
    """Return the cost of one warm-up step, if there is a warm-up."""
    if not scorer.needs_warmup or config.selection is not None:
        return None
    handle = None if scorer.needs_backward else model.register_forward_hook(_start_at_loss)
    with frozen(model), scorer.attached():
        cost = step.cost(model, sums=list(scorer.statistics()))
    if handle is not None:
        handle.remove()
    return cost if config.accumulator_device != "cpu" else replace(cost, added=0, peak=cost.peak - cost.added)


def _start_at_loss(_, __, output) -> None:
    """Make the loss a leaf, so that backward begins and ends there."""
    output.loss.requires_grad_(True)


def _checkpoint(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing as SMTTrainer does: without a gradient for the embeddings."""
    # Early 5.x versions of transformers know only the second name; later ones warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def _gathered(model: nn.Module) -> int:
    """Return the bytes of all parameters outside the layers, plus twice those of the largest layer."""
    layers: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        index = layer_index(name)
        layers[index] = layers.get(index, 0) + parameter.nbytes
    outside = layers.pop(-1, 0)
    return outside + 2 * max(layers.values(), default=0)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, tied ones once."""
    yield from module.parameters()
    yield from module.buffers()


def _parts(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Return the tensors of a module or bias that is trained whole."""
    whole = get_whole(model, name)
    return iter([whole]) if isinstance(whole, Tensor) else _tensors(whole)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
