"""Mixtures of experts, in each of transformers' implementations of their products."""

import tiny
import torch
from architectures import EXPERTS, GROUPED
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

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
    """Build a mixture of experts with weights so large that the experts clearly differ."""
    model = tiny.build(architecture, **MODELS[architecture] | overrides)
    if architecture != "Llama4ForCausalLM":
        model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    # grouped_mm does not support float64.
    return model.train() if implementation == "grouped_mm" else model.double().train()


class Listed(nn.Module):
    """Experts that are modules in a list. Each token goes to one of them; an expert without tokens is not called."""

    def __init__(self, hidden: int, count: int = 8, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(hidden, width, bias=False), "down": nn.Linear(width, hidden, bias=False)})
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.gate(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        # In the order in which their first tokens come.
        for index in dict.fromkeys(chosen.tolist()):
            expert, rows = self.experts[index], (chosen == index).nonzero()[:, 0]
            part = expert["down"](silu(expert["up"](tokens[rows])))
            y = y.index_add(0, rows, part * weights[rows, None])
        return y.view_as(x)


class ListedForCausalLM(LlamaForCausalLM):
    """A Llama with `Listed` in place of each MLP."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Listed(config.hidden_size)
        self.post_init()


def listed(seed: int = 0) -> nn.Module:
    """Build a `ListedForCausalLM` as transformers initialises it, which learns faster."""
    config = LlamaConfig(**tiny.SIZES, num_key_value_heads=2, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ListedForCausalLM(config).eval()
