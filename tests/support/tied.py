"""The tiny Llama on disk, with a head of its own and with one that is tied to the embeddings."""

from pathlib import Path

import pytest
import tiny
from torch import nn
from transformers import AutoModelForCausalLM


@pytest.fixture(name="base", params=[False, True], ids=["untied", "tied"])
def either_base(request, tmp_path) -> Path:
    """Write the model; return its folder. Import this into a test module to run its tests with either as `base`."""
    tiny.llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> nn.Module:
    """Load a causal language model."""
    return AutoModelForCausalLM.from_pretrained(folder)
