"""Measure how far two models that should agree differ on a few prompts.

With p and q the next-token distributions of the first and the second model, over all T tokens of the prompts,

    divergence   mean of KL(p || q) = sum p log(p / q)      (nats)
    agreement    share of tokens after which both predict the same most likely token
    largest      largest absolute difference of two logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "Question: If a train travels 60 miles in 2 hours, how fast does it go? Answer: The train goes",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return",
    "Water boils at 100 degrees Celsius, and it freezes when",
)
RANDOM_TOKENS = 24


class LogitDifference(NamedTuple):
    """The difference of two models; see the top of this file."""

    tokens: int
    divergence: float
    agreement: float
    largest: float

    def __str__(self) -> str:
        return (
            f"over {self.tokens} tokens of a few prompts: KL {self.divergence:.3g} nats, the same most likely token "
            f"after {self.agreement:.0%} of them, logits differ by at most {self.largest:.3g}"
        )


@torch.no_grad()
def compare_logits(first: Any, second: Any, prompts: list[Tensor]) -> LogitDifference:
    """Compare two models that give logits.

    Args:
        first, second: in evaluation mode.
        prompts: token ids [tokens] each.
    """
    divergence, same, largest, tokens = 0.0, 0, 0.0, 0
    for ids in prompts:
        p, q = (
            model(ids[None].to(model.device))
            .logits[0]
            .float()
            .cpu()
            .reshape(-1, model.config.get_text_config().vocab_size)
            for model in (first, second)
        )
        largest = max(largest, (p - q).abs().max().item())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return LogitDifference(tokens, divergence / tokens, same / tokens, largest)


def compare_with_merged(trained: Any, merged: Path) -> LogitDifference | None:
    """Compare a trained model with a merged checkpoint; None if it has no logits over a vocabulary from tokens alone.

    Args:
        trained: in evaluation mode.
        merged: folder of the checkpoint, which is loaded in its own dtype.
    """
    plain = type(trained).from_pretrained(merged, dtype="auto").eval()
    reads_tokens = getattr(plain, "main_input_name", "input_ids") == "input_ids"
    has_head = hasattr(plain, "get_output_embeddings") and plain.get_output_embeddings() is not None
    if not (reads_tokens and has_head) or getattr(plain.config, "is_encoder_decoder", False):
        return None
    return compare_logits(trained, plain, prompts_for(merged, plain.config.get_text_config().vocab_size))


def prompts_for(folder: Path, vocabulary: int) -> list[Tensor]:
    """Return prompts as token ids, by the tokenizer in a folder, or random ids if none can be loaded."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (RANDOM_TOKENS,), generator=generator) for _ in PROMPTS]
    return [torch.tensor(tokenizer(prompt).input_ids) for prompt in PROMPTS]


def _tokenizer(folder: Path) -> Any | None:
    from transformers import AutoTokenizer

    # transformers 5.5 returns an empty tokenizer for a folder without one.
    if not [*folder.glob("*token*"), *folder.glob("vocab*")]:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ImportError, OSError, ValueError, KeyError, TypeError):
        return None
