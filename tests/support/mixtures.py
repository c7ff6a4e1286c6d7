"""Mixtures of experts, with each way to write their products."""

import tiny
import torch
from architectures import EXPERTS, GROUPED
from torch import nn

LOCAL = GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = GROUPED | EXPERTS | {"num_experts": 8}
MODELS = {
    "Qwen3MoeForCausalLM": QWEN,
    "MixtralForCausalLM": LOCAL,
    "GptOssForCausalLM": LOCAL,
    "Llama4ForCausalLM": LOCAL | {"intermediate_size_mlp": 96},
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [
    (architecture, implementation)
    for architecture in MODELS
    for implementation in IMPLEMENTATIONS
    if architecture != "Llama4ForCausalLM" or implementation == "eager"
]


def untrained(architecture: str, implementation: str = "grouped_mm", seed: int = 0) -> nn.Module:
    """Build a mixture of experts as transformers initialises it, which learns faster."""
    model = tiny.build(architecture, seed, **MODELS[architecture], initializer_range=0.1)
    model.set_experts_implementation(implementation)
    return model


def mixture(architecture: str = "Qwen3MoeForCausalLM", implementation: str = "grouped_mm", **overrides) -> nn.Module:
    """Build a mixture of experts with weights large enough that no expert is like another."""
    model = tiny.build(architecture, **MODELS[architecture] | overrides)
    if architecture != "Llama4ForCausalLM":
        model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    # grouped_mm knows no float64.
    return model.train() if implementation == "grouped_mm" else model.double().train()
