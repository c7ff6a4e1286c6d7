"""Callbacks that write the blocks back where no hook of the optimizer does."""

from __future__ import annotations

from transformers import TrainerCallback

from smt_trainer.model.sharded import is_sharded
from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.sparse.write_back import write_back


class WriteBack(TrainerCallback):
    """Base class of callbacks that write blocks back. It looks up the rewritten linears once per run."""

    def __init__(self) -> None:
        self.linears: list[BlockModule] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """The model is rewritten."""
        self.linears = [] if model is None else [linear for _, linear in block_modules(model)]


class CompiledWriteBack(WriteBack):
    """Write back changes that callbacks make to the blocks: a compiled forward does not check whether it must."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The callbacks of the previous step are done."""
        write_back(linear for linear in self.linears if not is_sharded(linear.blocks) and linear.is_stale())


class DeepSpeedWriteBack(WriteBack):
    """Write back the blocks after DeepSpeed's steps: its optimizer holds other tensors, so no hook sees them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """DeepSpeed may have just loaded blocks from a checkpoint."""
        super().on_train_begin(args, state, control, model, **kwargs)
        write_back(self.linears)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """The optimizer has just changed the blocks."""
        write_back(self.linears)
