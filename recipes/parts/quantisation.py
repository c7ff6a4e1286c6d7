"""Load the base in 4 or 8 bits, quantised by bitsandbytes."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from smt_trainer.delta.onto import in_words


def quantised_loading(bits: int | None, config: PretrainedConfig, dtype: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`, besides the dtype, that quantise a base; none if `bits` is None.

    Args:
        bits: 4 (NF4 with double quantisation, which computes in `dtype`), 8 (LLM.int8) or None.
        config: configuration of the base.
        dtype: dtype of the weights that are not quantised.
        device: device to load the base onto.

    Raises:
        ValueError: the checkpoint of the base is already quantised.
    """
    if bits is None:
        return {}
    stored = config.to_dict().get("quantization_config")
    if stored is not None:
        raise ValueError(
            f"the base is already quantised ({in_words(stored)}). Leave out --load_in_{bits}bit to train over it "
            "as it is, or give the checkpoint that it was made from."
        )
    return {"quantization_config": quantisation(bits, getattr(torch, dtype)), "device_map": {"": device}}


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration of NF4 with double quantisation, which computes in `dtype`, or of LLM.int8."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
