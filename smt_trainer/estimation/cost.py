"""Count the cost of one training step on each device, on a model without values.

The model lies on the meta device, where a tensor has a shape but no values. It runs one step there as in training, with
its linears rewritten and its activations checkpointed or not. The cost of the step is counted, not modelled (see
`meter.py`). In bytes, for each device:

    peak         = weights + added + optimizer + largest sum of all other tensors alive at any time in the step
    weights      = the model's parameters and buffers
    added        = what else stays throughout: the masters of n blocks of m weights and their positions, LoRA's adapters
                   (in float32, as PEFT keeps them), or the accumulators of the warm-up
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
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError, first_line
from smt_trainer.estimation.meter import read_step
from smt_trainer.estimation.quantised import QuantisedBase
from smt_trainer.model.activation_checkpointing import checkpoint_activations
from smt_trainer.model.names import layer_index
from smt_trainer.scores import Scorer
from smt_trainer.scores.preserved import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_COUNT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Cost of one step, in bytes on each device except for `trainable` and `flops`; see the top of this file.

    Attributes:
        trainable: number of trained parameters; 0 in the warm-up.
        weights: the model's parameters and buffers, quantised ones with their scales.
        added: masters, adapters or accumulators.
        optimizer: AdamW's state, its moments in the dtype of what is trained: of SMT's masters, or of the weights in
            full fine-tuning.
        gradients: those at the end of backward, with DDP's buckets.
        activations: tensors alive when the output embeddings are reached.
        loss: the most that output embeddings and loss add to `activations`.
        peak: the most that is alive at one time.
        flops: FLOPs of forward and backward on each device, two for each multiply-add.
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
class Step:
    """The settings that all steps share, as in `estimate`; `dense` is the bytes of the plain model."""

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
            checkpoint_activations(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and sums is None]
        added = bytes_of(tensors_of(model)) - self.dense + bytes_of(sums or [])
        quantised = self.base.keep_inputs(model)
        weights = self.dense - bytes_of(quantised) + self.base.nbytes
        optimizer = 2 * bytes_of(trained) + STEP_COUNT_BYTES * len(trained)
        share = [1 / self.ranks if self.zero_stage >= stage else 1 for stage in range(4)]
        kept = share[2] if sums is None else 1
        try:
            reading = read_step(
                model, self.batch, self.seq, beside=sums or [], quantised=quantised, gradient_share=kept
            )
        except Exception as error:  # an odd configuration can make a model raise anything
            raise SMTError(f"{type(model).__name__} cannot run on the meta device: {first_line(error)}") from error
        buckets = bytes_of(trained) if self.ranks > 1 and self.zero_stage == 0 else 0
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


def warmup_cost(model: PreTrainedModel, scorer: Scorer, config: SMTConfig, step: Step) -> Cost | None:
    """Return the cost of one warm-up step; None if there is no warm-up."""
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


def _gathered(model: nn.Module) -> int:
    """Return the bytes of all parameters outside the layers, plus twice those of the largest layer."""
    layers: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        index = layer_index(name)
        layers[index] = layers.get(index, 0) + parameter.nbytes
    outside = layers.pop(-1, 0)
    return outside + 2 * max(layers.values(), default=0)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, tied ones once."""
    yield from module.parameters()
    yield from module.buffers()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors take together."""
    return sum(tensor.nbytes for tensor in tensors)
