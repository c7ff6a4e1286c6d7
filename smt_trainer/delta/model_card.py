"""The section of a model card that explains a delta."""

from __future__ import annotations

import re

from smt_trainer.selection.block_selection import BlockSelection

SECTION = """
## Sparse Matrix Tuning

This repository holds a delta, not a model: the trained values of {num_blocks:,} blocks of the weights of {base}.

| | |
|---|---|
| trained | {summary} |
| chosen by | {chosen_by} |

```python
from huggingface_hub import snapshot_download
from smt_trainer import from_delta

model = from_delta(snapshot_download("{repository}"))  # the class that was trained, with its base
```
"""


def without_pipeline(card: str) -> str:
    """Return a model card without the section that loads the repository as a whole model."""
    return re.sub(r"## Quick start\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)


def delta_section(selection: BlockSelection, repository: str) -> str:
    """Return a section in Markdown: a delta's base, selection and budget, and how to load it from its repository."""
    config = selection.config
    told = ["score", "smt_warmup_steps", "scope", "budget", "budget_of", "layer_cap"]
    return SECTION.format(
        num_blocks=selection.num_blocks,
        base=f"`{selection.base_model}`" if selection.base_model else "a base model that was not recorded",
        summary=selection.summary(),
        chosen_by=", ".join(f"`{name}={getattr(config, name)!r}`" for name in told),
        repository=repository,
    )
