"""Let Trainer take a quantised model without adapters.

Trainer refuses a quantised model unless it holds adapters of PEFT, or says so in `_hf_peft_config_loaded`. The blocks
take their place. The mark is removed when the trainer is made, since saving would believe it.

What peft's `prepare_model_for_kbit_training` does besides is not needed: rewriting freezes all other parameters; the
trained blocks are in float32 whatever the norms and the output embeddings are in; and Trainer itself makes the inputs
require a gradient for reentrant checkpointing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

MARK = "_hf_peft_config_loaded"


@contextlib.contextmanager
def admitting_quantised(trainer: Any, model: Any) -> Generator[None]:
    """Let the constructor of Trainer within this context take a model, or what its `model_init` makes, as it is."""
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
