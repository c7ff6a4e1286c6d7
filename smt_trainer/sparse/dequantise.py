"""Make the quantised weights of a model dense again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smt_trainer.model.names import plain_name
from smt_trainer.model.quantised import dequantised, floating_dtype, is_quantised, make_plain
from smt_trainer.sparse.block_module import BlockModule


def dequantise(model: Any) -> None:
    """Give every quantised linear of a model a dense weight, with the blocks if it has any, in place and in the dtype
    of the model's other weights; and remove all marks of quantisation from the model."""
    dtype = floating_dtype(model)
    for linear in [module for module in model.modules() if is_quantised(module)]:
        if isinstance(linear, BlockModule):
            linear.to_plain()
            linear.weight.data = linear.weight.data.to(dtype)
        else:
            make_plain(linear, dequantised(linear, dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    # transformers read a quantised checkpoint by these conversions, and would reverse them on saving.
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        model._weight_conversions = [each for each in conversions if not _deserialises(each)]


def _deserialises(conversion: Any) -> bool:
    """Return whether a conversion of transformers assembles quantised weights from their stored parts."""
    operations = getattr(conversion, "operations", ())
    return any(type(operation).__module__ == "transformers.integrations.bitsandbytes" for operation in operations)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that a rewritten, quantised model would have if `merge_and_unload` made it dense."""
    dtype = floating_dtype(model)
    state = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for path, module in model.named_modules():
        if not (is_quantised(module) or isinstance(module, BlockModule)):
            continue
        prefix = f"{plain_name(path)}."
        own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name in own.keys() - {f"{prefix}weight", f"{prefix}bias"}:
            del state[name]
        if is_quantised(module):
            has_blocks = isinstance(module, BlockModule)
            weight = module.merged_weight() if has_blocks else dequantised(module, dtype)
            state[f"{prefix}weight"] = weight.to(dtype)
    return state
