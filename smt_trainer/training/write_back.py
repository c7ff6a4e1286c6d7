"""Callbacks that write the blocks back where the hook of the optimizer does not, or comes too early.

DeepSpeed                                      its optimizer holds other tensors
callbacks, and optimizers that are not torch's   may change blocks after the hook, and without a trace (`.data`)
compiled models                                do not look for changes in forward
"""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.sparse.write_back import write_back

# Packages whose callbacks and optimizers change trained values only by an optimizer's step.
KNOWN = ("torch", "bitsandbytes", "accelerate", "transformers", "trl", "smt_trainer")


class WriteBack(TrainerCallback):
    """Base class of callbacks that write blocks back. It looks up the rewritten linears once per run."""

    def __init__(self) -> None:
        self.linears: list[BlockModule] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """The model is rewritten."""
        self.linears = [] if model is None else [linear for _, linear in block_modules(model)]


class ChangesWriteBack(WriteBack):
    """Write back, before each step, what others have changed in the blocks since the optimizer's hook.

    Args:
        handler: of the trainer's callbacks.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        super().__init__()
        self.handler = handler

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Look at the linears only if there is somebody whose changes could be missed."""
        super().on_train_begin(args, state, control, model, **kwargs)
        others = [*self.handler.callbacks, getattr(optimizer, "optimizer", optimizer)]
        if all(map(_is_known, others)) and not (args.torch_compile or _is_compiled(model)):
            self.linears = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The optimizer and the callbacks of the previous step are done."""
        for linear in self.linears:
            linear.write_if_changed()


def _is_known(other: object) -> bool:
    return other is None or type(other).__module__.partition(".")[0] in KNOWN


def _is_compiled(model: nn.Module | None) -> bool:
    """Return whether a part of a model was compiled in place (`module.compile()`), which wraps nothing."""
    return model is not None and any(module._compiled_call_impl is not None for module in model.modules())


class DeepSpeedWriteBack(WriteBack):
    """Write back the blocks after DeepSpeed's steps: its optimizer holds other tensors, so no hook sees them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """DeepSpeed may have just loaded blocks from a checkpoint."""
        super().on_train_begin(args, state, control, model, **kwargs)
        write_back(self.linears)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """The optimizer has just changed the blocks."""
        write_back(self.linears)
