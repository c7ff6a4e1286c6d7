"""Build the model of a checkpoint without its values: names, shapes, ties and kinds of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smt_trainer.errors import SMTError, first_line
from smt_trainer.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model that a checkpoint's config.json describes, on the meta device.

    Raises:
        SMTError: there is no config.json, it names no class of transformers, or none can be built from it.
    """
    import transformers

    names = (checkpoint.config or {}).get("architectures") or [""]
    kind = model_class(str(names[0]))
    if kind is None:
        raise SMTError(
            f"the config.json of {checkpoint.folder} should name a model class of transformers as its architecture, "
            f"got {names[0]!r}. Save the model with save_pretrained."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # an odd configuration makes transformers raise anything
        raise SMTError(f"no {names[0]} can be built from {checkpoint.folder}: {first_line(error)}") from error


def model_class(name: str | None) -> type[PreTrainedModel] | None:
    """Return transformers' model class with a name, which may come from a file; None if there is none."""
    import transformers

    found = getattr(transformers, name or "", None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
