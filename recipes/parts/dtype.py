"""Choose the dtype of the weights: bfloat16 where it is faster, else float32. Trained blocks are float32 either way."""

import logging
import time

import torch
from torch.nn.functional import linear
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CLEARLY = 1.2
"""How many times as fast bfloat16 must be on a processor, so that the choice does not change from run to run."""
WORK, REPEATS = 2**28, 3
"""Multiplications in one measured product, and how often it is measured; the fastest counts."""


def fastest_dtype(config: PretrainedConfig) -> str:
    """Return the faster of "bfloat16" and "float32" for a model of this width on this machine, and log why.

    On a GPU, bfloat16 is chosen if supported; on a processor, by a measurement that takes a fraction of a second.
    """
    if torch.cuda.is_available():
        found = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"the GPU has {'' if found else 'no '}bfloat16 products"
    elif not has_bfloat16_products():
        found, reason = False, "the processor has no bfloat16 products"
    else:
        width = config.get_text_config().hidden_size
        speedup = seconds(width, torch.float32) / seconds(width, torch.bfloat16)
        found = speedup >= CLEARLY
        reason = f"products in bfloat16 take {1 / speedup:.0%} of the time of those in float32 here"
    name = "bfloat16" if found else "float32"
    logger.info("The weights are loaded in %s: %s.", name, reason)
    return name


def has_bfloat16_products() -> bool:
    """Tell whether the processor has instructions for products of bfloat16."""
    return any(present for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def seconds(width: int, dtype: torch.dtype) -> float:
    """Return the time of a product [tokens, width] x [width, width] of about `WORK` multiplications."""
    weight = torch.ones(width, width, dtype=dtype)
    rows = torch.ones(max(1, WORK // weight.numel()), width, dtype=dtype)
    linear(rows, weight)  # the first call also sets up the kernel
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        linear(rows, weight)
        times.append(time.perf_counter() - start)
    return min(times)
