"""Quantise a model in memory with bitsandbytes, as transformers does when it loads one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recipes.parts.quantisation import quantisation
from smt_trainer.model.kinds import named_linears
from smt_trainer.model.quantised import bits_of, is_quantised, keep_differentiable

# Quantised base -> the bits of a weight, and its name in a report.
BITS = {"nf4": 4, "int8": 8}
NAMES = {"nf4": "NF4 with double quantisation, multiplied in bfloat16", "int8": "LLM.int8"}


def quantise(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """Return a model as transformers loads it with a quantisation of `BITS`. It shares the tensors left unquantised.

    The result can be copied: 8-bit scales are already where the first forward would move them, which only one of
    several copies that share a weight could do. In 4 bits it stays differentiable after an evaluation on a CPU.
    """
    found = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        quantization_config=quantisation(BITS[base], torch.bfloat16),
        dtype=model.dtype,
    )
    keep_differentiable(found)
    for linear in quantised_linears(found):
        if bits_of(linear) == 8:
            linear.init_8bit_state()
    return found


def quantised_linears(model: nn.Module) -> list[Any]:
    """Return the quantised linears of a model, without PEFT's layers around them."""
    return [linear for linear in named_linears(model).values() if is_quantised(linear)]


def quantisation_states(model: nn.Module) -> list[Any]:
    """Return bitsandbytes' record of each quantised weight of a model: its scales, and in 8 bits the weight itself."""
    return [linear.state if bits_of(linear) == 8 else linear.weight.quant_state for linear in quantised_linears(model)]


def scales(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model holds besides its quantised weights: scales and lookup tables."""
    found = []
    for state in quantisation_states(model):
        records = [state, getattr(state, "state2", None)]
        names = ("SCB", "absmax", "code", "offset")
        found += [getattr(record, name, None) for record in records for name in names]
    return [tensor for tensor in found if tensor is not None]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return bitsandbytes' operators that multiply x [..., I] by a weight [O, I] -> their FLOPs, from the shapes."""
    operators = torch.ops.bitsandbytes
    return {
        operators.gemm_4bit: lambda x, packed, shape, *_, **__: 2 * math.prod(x) * shape[0],
        operators.int8_mixed_scaled_mm: lambda x, x_in_8_bits, weight, *_, **__: 2 * math.prod(x) * weight[0],
    }
