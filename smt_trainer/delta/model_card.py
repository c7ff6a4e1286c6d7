"""The section of a model card that explains a delta."""

from __future__ import annotations

import re
from typing import Any

from smt_trainer.delta.onto import in_words
from smt_trainer.selection.block_selection import BlockSelection

SECTION = """
## Sparse Matrix Tuning

This repository holds a delta, not a model: the trained values of {num_blocks:,} blocks of the weights of {base}.

| | |
|---|---|
| trained | {summary} |
| chosen by | {chosen_by} |{quantised}

```python
from huggingface_hub import snapshot_download
from smt_trainer import from_delta

model = from_delta(snapshot_download("{repository}"){onto})  # the class that was trained, with its base
```
"""
QUANTISED = """
| trained over a quantised base | {how}; `quantization_config=` instead of `onto=` gives exactly the trained model |"""


def without_pipeline(card: str) -> str:
    """Return a model card without the section that loads the repository as a whole model."""
    return re.sub(r"## Quick start\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)


def delta_section(selection: BlockSelection, repository: str, quantization: dict[str, Any] | None = None) -> str:
    """Return a section in Markdown: a delta's base, selection and budget, and how to load it from its repository."""
    config = selection.config
    told = ["score", "smt_warmup_steps", "scope", "budget", "budget_of", "layer_cap", "rank_cap"]
    return SECTION.format(
        num_blocks=selection.num_blocks,
        base=f"`{selection.base_model}`" if selection.base_model else "a base model that was not recorded",
        summary=selection.summary(),
        chosen_by=", ".join(f"`{name}={getattr(config, name)!r}`" for name in told),
        repository=repository,
        quantised="" if quantization is None else QUANTISED.format(how=in_words(quantization)),
        onto="" if quantization is None else ', onto="dequantized"',
    )
