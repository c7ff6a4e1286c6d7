"""The measured models, given by their dimensions: Llama, and a mixture of experts."""

from typing import NamedTuple

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


class Shape(NamedTuple):
    """The fields of `LlamaConfig` that decide how many weights there are and where."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def config(self) -> LlamaConfig:
        """Return the model's configuration."""
        return LlamaConfig(**self._asdict())

    def build(self) -> LlamaForCausalLM:
        """Build the model on the current default device."""
        return LlamaForCausalLM(self.config())


class Mixture(NamedTuple):
    """The fields of `Qwen3MoeConfig` that decide how many weights there are and where."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int

    def config(self) -> Qwen3MoeConfig:
        """Return the model's configuration."""
        return Qwen3MoeConfig(**self._asdict())

    def build(self) -> Qwen3MoeForCausalLM:
        """Build the model on the current default device."""
        return Qwen3MoeForCausalLM(self.config())


MODELS = {
    "SmolLM2-135M": Shape(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "Llama-3.2-3B": Shape(28, 3072, 24, 8, 8192, 128256, tie_word_embeddings=True),
    "Llama-2-7B": Shape(32, 4096, 32, 32, 11008, 32000),
    "Llama-3-8B": Shape(32, 4096, 32, 8, 14336, 128256),
    "Llama-3-70B": Shape(80, 8192, 64, 8, 28672, 128256),
    "Llama-3.1-405B": Shape(126, 16384, 128, 8, 53248, 128256),
}


def tiny(layers: int) -> Shape:
    """Return a shape with many tiny targets."""
    return Shape(layers, 64, 4, 2, 96, 64)
