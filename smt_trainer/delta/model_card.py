"""The model card of a delta: the Trainer's, with a section on the delta and the code that loads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smt_trainer.delta.auto_class import loaded_by
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.onto import in_words
from smt_trainer.model.hub import split_commit
from smt_trainer.selection.block_selection import BlockSelection

SECTION = """
## Sparse Matrix Tuning

This repository holds a delta, not a model: the trained values of {num_blocks:,} blocks of the weights of {base}.

| | |
|---|---|
| trained | {summary} |
| chosen by | {chosen_by} |
| class | `{architecture}` |{quantised}

```python
{code}
```
"""
QUANTISED = """
| trained over a quantised base | {how}; `quantization_config=` instead of `onto=` gives exactly the trained model |"""
# File of a processor or tokenizer -> variable and class that load it; the first one in the folder is used.
PREPARING = {
    "processor_config.json": ("processor", "AutoProcessor"),
    "preprocessor_config.json": ("processor", "AutoProcessor"),
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
}


def new_card(delta: Delta, folder: Path, repository: str) -> str:
    """Return a model card for a delta that has none from a Trainer."""
    from transformers.modelcard import TrainingSummary

    name = _name_on_hub(delta.selection)
    summary = TrainingSummary(repository.rpartition("/")[2], finetuned_from=name)
    return delta_card(
        summary.to_model_card(), delta.selection, delta.architecture, folder, repository, delta.quantization
    )


def delta_card(
    card: str,
    selection: BlockSelection,
    architecture: str,
    folder: Path,
    repository: str,
    quantization: dict[str, Any] | None = None,
) -> str:
    """Turn a Trainer's model card into that of a delta.

    The metadata say what is in the repository (a delta of `base_model` that smt_trainer loads, and for which task). A
    new section states base, selection and budget, and how to load the delta; the section that loads a whole model is
    left out.

    Args:
        card: in Markdown, with YAML metadata at the top.
        selection: the trained blocks.
        architecture: class of the trained model.
        folder: the delta's folder, with any tokenizer or processor.
        repository: name on the hub.
        quantization: the `quantization_config` of a quantised base.
    """
    from huggingface_hub import ModelCard

    described = ModelCard(card, ignore_metadata_errors=True)
    head: Any = described.data
    head.library_name = "smt_trainer"
    head.pipeline_tag = loaded_by(architecture).task
    if head.base_model:
        head.base_model_relation = "adapter"
    described.text = without_pipeline(described.text) + _section(
        selection, architecture, folder, repository, quantization
    )
    return str(described)


def without_pipeline(card: str) -> str:
    """Return a model card without the section that loads the repository as a whole model."""
    return re.sub(r"## Quick start\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)


def _section(
    selection: BlockSelection, architecture: str, folder: Path, repository: str, quantization: dict[str, Any] | None
) -> str:
    config = selection.config
    told = ["score", "smt_warmup_steps", "scope", "budget", "budget_of", "layer_cap", "rank_cap"]
    return SECTION.format(
        num_blocks=selection.num_blocks,
        base=f"`{selection.base_model}`" if selection.base_model else "a base model that was not recorded",
        summary=selection.summary(),
        chosen_by=", ".join(f"`{name}={getattr(config, name)!r}`" for name in told),
        architecture=architecture,
        quantised="" if quantization is None else QUANTISED.format(how=in_words(quantization)),
        code=_code(selection, architecture, folder, repository, is_quantised=quantization is not None),
    )


def _code(selection: BlockSelection, architecture: str, folder: Path, repository: str, *, is_quantised: bool) -> str:
    """Return lines of Python that load the delta and its tokenizer or processor."""
    loader = loaded_by(architecture)
    imported, arguments, lines = [], [f'"{repository}"'], []
    if loader.name:
        arguments.append(loader.name)
    if loader.is_known:
        imported.append(loader.name)
    if _name_on_hub(selection) is None:
        arguments.append(f'base="path/to/{selection.base_model or "base"}"')
    if is_quantised:
        arguments.append('onto="dequantized"')
    lines.append(f"model = from_delta({', '.join(arguments)})")
    for file, (variable, auto_class) in PREPARING.items():
        if (folder / file).is_file():
            imported.append(auto_class)
            lines.append(f'{variable} = {auto_class}.from_pretrained("{repository}")')
            break
    imports = ["from smt_trainer import from_delta"]
    if imported:
        imports.append(f"from transformers import {', '.join(sorted(imported))}")
    return "\n".join([*imports, "", *lines])


def _name_on_hub(selection: BlockSelection) -> str | None:
    """Return the base's name on the hub, or None for a local folder, of which only the last name is recorded."""
    name, commit = split_commit(selection.base_model)
    return name if commit or "/" in name else None
