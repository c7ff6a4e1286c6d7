"""Make Trainer accept a quantised model without adapters.

Trainer refuses a quantised model unless it has PEFT adapters, or claims to by `_hf_peft_config_loaded`. Here the blocks
are trained in place of adapters. So the model is marked while the trainer is constructed; afterwards the mark is
removed, since saving would rely on it.

The rest of what peft's `prepare_model_for_kbit_training` does is not needed: rewriting freezes all other parameters;
the trained blocks are in `master_dtype` (float32 by default), whatever the norms and the output embeddings are in; and
Trainer itself makes the inputs require a gradient for reentrant checkpointing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

MARK = "_hf_peft_config_loaded"


@contextlib.contextmanager
def admitting_quantised(trainer: Any, model: Any) -> Generator[None]:
    """Within this context, make Trainer's constructor accept a quantised model, given or made by `model_init`."""
    marked = []

    def mark(model: Any) -> Any:
        if getattr(model, "is_quantized", False) and not getattr(model, MARK, False):
            setattr(model, MARK, True)
            marked.append(model)
        return model

    make = trainer.call_model_init
    trainer.call_model_init = lambda trial=None: mark(make(trial))
    try:
        mark(model)
        yield
    finally:
        del trainer.call_model_init
        for one in marked:
            delattr(one, MARK)
