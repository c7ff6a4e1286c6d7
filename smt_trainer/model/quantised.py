"""Recognise weights that bitsandbytes has quantised, and compute their values.

    4 bits   NF4 or FP4: Q(W) = code[index] * absmax, an index for each weight and an absmax for each 64 of them, which
             double quantisation stores in 8 bits
    8 bits   LLM.int8: Q(W) = index * scale / 127, a scale for each row

bitsandbytes' linears compute with Q(W): with 4 bits they dequantise it for each product in their `compute_dtype`, with
8 bits they quantise the inputs, too. Weights quantised by other libraries are not recognised and cannot be targets.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.sharded import full_tensor


def bits_of(linear: object) -> int | None:
    """Return 4 or 8 if bitsandbytes has quantised a linear's weight to this many bits, else None."""
    weight: Any = getattr(linear, "weight", None)
    if type(weight).__module__.partition(".")[0] != "bitsandbytes":
        return None
    if getattr(weight, "quant_state", None) is not None:
        return 4
    return 8 if weight.dtype == torch.int8 else None


def is_quantised(linear: object) -> bool:
    """Return whether bitsandbytes has quantised a linear's weight."""
    return bits_of(linear) is not None


def dequantised(linear: Any, dtype: torch.dtype) -> Tensor:
    """Return a new tensor with the values Q(W) [O, I] of a quantised weight, as bitsandbytes makes them in `dtype`."""
    import bitsandbytes.functional as F

    if bits_of(linear) == 8:
        return F.int8_vectorwise_dequant(linear.weight.data, _scales(linear)).to(dtype)
    state = copy.copy(linear.weight.quant_state)
    state.dtype = dtype
    return F.dequantize_4bit(linear.weight.data, state)


def dense_weight(linear: Any) -> Tensor:
    """Return the full values of a linear's weight, detached; for a quantised weight, a new tensor in float32."""
    return dequantised(linear, torch.float32) if is_quantised(linear) else full_tensor(linear.weight)


def _scales(linear: Any) -> Tensor:
    """Return the scale of each row [O]; bitsandbytes moves them from the weight to the state at the first forward."""
    return linear.weight.SCB if linear.state.SCB is None else linear.state.SCB


def compute_dtype(linear: Any, x: Tensor) -> torch.dtype:
    """Return the dtype in which a quantised linear multiplies an input: its own, that of autocast, or the input's."""
    own, device = getattr(linear, "compute_dtype", None), x.device.type
    if own is not None:
        return own
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model was loaded in: that of its first floating-point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model as JSON types; None if it has none."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config, default=str))


def keep_differentiable(model: nn.Module) -> None:
    """Permanently stop bitsandbytes from repacking 4-bit weights when the model is evaluated on a CPU.

    Repacking makes a weight's scales coarser for good, and no gradient passes through products with it: all layers
    before it would silently stop learning after the first evaluation.

    Raises:
        SMTError: a weight has been repacked already.
    """
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in ((name, module) for name, module in modules if bits_of(module) == 4):
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise SMTError(
                f"bitsandbytes has repacked `{name}` for inference on a CPU, since the model was evaluated before: its "
                "values are coarser now, and no gradient passes through it. Load the model again, and make the trainer "
                "(or call BlockScores.of or convert_to_smt) before evaluating it."
            )
        module.support_avx512bf16_for_cpu = False


def make_plain(linear: Any, weight: Tensor) -> nn.Linear:
    """Turn a quantised linear in place into an `nn.Linear` with this weight [O, I], frozen."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name in vars(linear).keys() - vars(plain).keys():
        delattr(linear, name)
    linear.__class__ = nn.Linear
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
