"""The memory of a base quantised by bitsandbytes, as transformers' `BitsAndBytesConfig` loads it.

All linears except the output embeddings are quantised. All embeddings, norms and biases stay in the model's dtype
(PEFT's `prepare_model_for_kbit_training`, which casts them to float32, is not assumed). In bytes, a weight W [O, I]
takes

    LLM.int8, 8 bits    O I + 4 O                                           a scale (float32) for each row
    NF4, 4 bits         O I / 2 + B + 4 ceil(B / 256) + 4 (16 + 256 + 1)    B = ceil(O I / 64)

NF4 has double quantisation (QLoRA; `bnb_4bit_use_double_quant=True`): each run of 64 weights has a scale of one byte,
each run of 256 scales has one in float32; the mean of the scales and the tables of the values that 4 and 8 bits
stand for are stored as well. So a weight takes 0.516 bytes; it would take 0.5625 with all scales in float32.

Each product with W dequantises W into the dtype of x, and then drops the copy: once in forward, and again in backward
for dx. That is the only dense copy, whether the linear has blocks, adapters or neither. What is kept of x depends on
the linear:

    Linear4bit                      nothing
    Linear8bitLt                    x, until backward is over: activation checkpointing neither sees nor drops it
    a linear with blocks            the same as over a dense weight
    adapters                        the same as over a dense weight, in addition to what their base keeps

The warm-up computes the gradient of a target's weight as over a dense one. The int8 product of a GPU reads W as it is,
but makes copies of x in int8 and of y in int32; they are left out, and W is counted as dequantised there too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.kinds import is_conv1d, named_linears
from smt_trainer.model.names import lies_in
from smt_trainer.sparse.block_module import BlockModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smt_trainer.model.kinds import Linear

NF4, INT8 = 4, 8
BITS = (NF4, INT8)
RUN, RUN_OF_SCALES = 64, 256
FLOAT_BYTES = 4
TABLES = 16 + 256


@dataclass(frozen=True)
class QuantisedBase:
    """Which linears of a model are quantised; none by default.

    Attributes:
        bits: 4 or 8; None: nothing is quantised.
        sizes: full name of each quantised linear -> bytes of its weight, scales included.
    """

    bits: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, bits: int | None) -> QuantisedBase:
        """Find the linears of a plain model that transformers would quantise; none if `bits` is None.

        Raises:
            SMTError: `bits` is not 4, 8 or None.
        """
        if bits is None:
            return cls()
        if bits not in BITS:
            raise SMTError(f"bits must be {NF4} (NF4), {INT8} (LLM.int8) or None, got {bits}.")
        head = model.get_output_embeddings()
        sizes = {
            name: quantised_bytes(linear, bits)
            for name, linear in named_linears(model).items()
            # transformers leaves out subclasses, such as FalconLinear.
            if linear is not head and (type(linear) is nn.Linear or is_conv1d(linear))
        }
        return cls(bits, sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all quantised weights."""
        return sum(self.sizes.values())

    def refuse_whole(self, whole: Iterable[str]) -> None:
        """Raise `SMTError` if any of the modules to train whole holds a quantised weight."""
        for name in whole:
            held = next((linear for linear in self.sizes if lies_in(linear, name)), None)
            if held is not None:
                raise SMTError(
                    f"modules_to_save trains `{name}` whole, but the weight of `{held}` is held in {self.bits} bits "
                    "and has no gradient. Remove it from modules_to_save, or estimate without bits."
                )

    def keep_inputs(self, model: nn.Module) -> list[Tensor]:
        """Make the linears of a model on the meta device keep as much of their input as quantised ones do.

        Args:
            model: has the linears of the model that was passed to `of`, possibly with blocks or adapters.

        Returns:
            The weights, which exist as dense matrices only while an operation reads them.
        """
        linears = [model.get_submodule(name) for name in self.sizes]
        for linear in linears:
            if self.bits == INT8 and not isinstance(linear, BlockModule):
                linear.register_forward_hook(_keep_input, prepend=True)
        return [linear.get_parameter("weight") for linear in linears]


def quantised_bytes(linear: Linear, bits: int) -> int:
    """Return the bytes of the weight of a linear in 4 or 8 bits, with its scales; see the top of this file."""
    count = linear.weight.numel()
    if bits == INT8:
        return count + FLOAT_BYTES * linear.weight.shape[1 if is_conv1d(linear) else 0]
    scales = -(-count // RUN)
    return -(-count // 2) + scales + FLOAT_BYTES * (-(-scales // RUN_OF_SCALES) + TABLES + 1)


class _KeepInput(torch.autograd.Function):
    """Return y and keep x with the graph, in an attribute as bitsandbytes does: hooks on saved tensors miss it."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor) -> Tensor:
        ctx.x = x
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyrefly: ignore[bad-override]  # torch calls it with one gradient per output
        return dy, None


def _keep_input(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _KeepInput.apply(output, inputs[0])
