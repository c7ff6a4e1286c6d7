"""Bases quantised by the real bitsandbytes, on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
KINDS = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def config(kind: str, **more) -> BitsAndBytesConfig:
    """Return the configuration of one of `KINDS`."""
    return BitsAndBytesConfig(**KINDS[kind] | more)


def load(base: Path, kind: str, **more) -> nn.Module:
    """Load a checkpoint in bfloat16, quantised; `more` are fields of the configuration."""
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config(kind, **more), dtype=torch.bfloat16)


def loader(base: Path, kind: str, **more):
    """Return a picklable function that loads a model."""
    return functools.partial(load, base, kind, **more)


def make_linear(kind: str, out: int = 64, into: int = 128, dtype=torch.bfloat16, bias: bool = True) -> nn.Module:
    """Make a quantised linear as transformers does, with random weights."""
    import bitsandbytes as bnb

    fields = KINDS[kind]
    plain = nn.Linear(into, out, bias=bias, dtype=dtype)
    if kind == "int8":
        linear = bnb.nn.Linear8bitLt(into, out, bias, has_fp16_weights=False, threshold=6.0)
        linear.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        quant_type, double = fields["bnb_4bit_quant_type"], fields.get("bnb_4bit_use_double_quant", False)
        linear = bnb.nn.Linear4bit(into, out, bias, dtype, compress_statistics=double, quant_type=quant_type)
        linear.weight = bnb.nn.Params4bit(
            plain.weight.data, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=linear
        )
    linear.bias = plain.bias
    return linear.to("cpu")
