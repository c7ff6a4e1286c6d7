"""Callbacks that write the blocks back where the hook of the optimizer does not, or comes too early.

DeepSpeed                           its optimizer holds other tensors
callbacks, methods of a subclass    may change blocks after the hook, and without a trace (`.data`), as may
                                    optimizers that are not torch's
compiled models                     do not look for changes in forward
"""

from __future__ import annotations

from torch import nn
from transformers import Trainer, TrainerCallback

from smt_trainer.model.sharded import is_sharded
from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.sparse.write_back import write_back, write_what_differs

# Packages whose trainers, callbacks and optimizers change trained values only by an optimizer's step.
KNOWN = ("builtins", "torch", "bitsandbytes", "accelerate", "transformers", "trl", "smt_trainer")


class WriteBack(TrainerCallback):
    """Base class of callbacks that write blocks back. It looks up the rewritten linears once per run."""

    def __init__(self) -> None:
        self.linears: list[BlockModule] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """The model is rewritten."""
        self.linears = [] if model is None else [linear for _, linear in block_modules(model)]


class ChangesWriteBack(WriteBack):
    """Write back, before each forward, what others have changed in the blocks since the optimizer's hook. The trainer
    calls `catch_up`.

    Args:
        trainer: whose callbacks, optimizer and own methods may do so.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.handler, self.kind = trainer.callback_handler, type(trainer)
        self.compares = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Look at the linears only if there is somebody whose changes could be missed."""
        super().on_train_begin(args, state, control, model, **kwargs)
        others = {type(each) for each in (*self.handler.callbacks, getattr(optimizer, "optimizer", optimizer))}
        # A subclass without a body only names the trainer behind the mixin.
        others |= {kind for kind in self.kind.__mro__ if any(not name.startswith("__") for name in vars(kind))}
        self.compares = not all(map(_is_known, others))
        if not (self.compares or args.torch_compile or _is_compiled(model)):
            self.linears = []

    def forget(self) -> None:
        """Look at nothing until the next run."""
        self.linears = []

    def catch_up(self) -> None:
        """Write back what was changed."""
        if self.compares:
            write_what_differs(self.linears)
        else:
            write_back(linear for linear in self.linears if not is_sharded(linear.blocks) and linear.is_stale())


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in KNOWN


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
