"""Check, in the first training step, that the chosen blocks get a gradient.

A gradient warm-up proves this beforehand. Without one (a score of the weights, a given selection), linears with blocks
may be out of reach, as `scores/reach.py` describes. The first optimizer step is refused if

- a linear was called and its blocks got no gradient: nothing uses its output, or
- the module around a linear ran without calling it: that module reads its weight directly.

Other linears may get a gradient in a later step: those in a list of modules (an expert without a token), those whose
module did not run (a dropped layer, the vision tower in a batch of text), and those of a compiled model, where no call
is seen. If no gradient ever comes, a warning says so at the end.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from smt_trainer.errors import SMTError
from smt_trainer.model.listed_experts import LISTS
from smt_trainer.model.names import list_projections
from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.training.optimizers import refuse_useless_optimizer

logger = logging.getLogger(__name__)


class ExpectGradients(TrainerCallback):
    """Refuses the first optimizer step if blocks got no gradient. The trainer always installs it.

    Attributes:
        is_armed: whether the next run is watched; the first optimizer step that passes disarms it.
        calls_are_known: whether a warm-up has seen all linears called.
    """

    def __init__(self) -> None:
        self.is_armed = self.calls_are_known = False
        self.awaited: dict[str, BlockModule] = {}
        self.ran: set[str] = set()
        self.handles: list[RemovableHandle] = []

    def arm(self, calls_are_known: bool) -> None:
        """Watch the next run."""
        self.is_armed, self.calls_are_known = True, calls_are_known

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Check that the optimizer holds the blocks; watch the linears with blocks, and the modules around them."""
        self.detach()
        self.awaited = {}
        if model is not None:
            refuse_useless_optimizer(model, optimizer)
        if not self.is_armed or model is None:
            return
        self.awaited = {name: linear for name, linear in block_modules(model) if linear.blocks.requires_grad}
        modules = dict(model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        self.around = {}
        for name, linear in self.awaited.items():
            around = names[id(linear)].rpartition(".")[0]
            if not isinstance(modules[around], LISTS):
                self.around[name] = f"{around}."
                self.watch(modules[around], f"{around}.")
            self.watch(linear, name)

    def watch(self, module: nn.Module, name: str) -> None:
        """Note the calls of a module in training."""
        self.handles.append(module.register_forward_pre_hook(functools.partial(self.note, name)))

    def note(self, name: str, module: nn.Module, inputs: tuple) -> None:
        """Note a call, except in an evaluation and in a compiled graph."""
        if not torch.compiler.is_compiling() and (module.training or torch.is_grad_enabled()):
            self.ran.add(name)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """All backward passes of a step are done."""
        if not self.awaited:
            return
        count = len(self.awaited)
        self.awaited = {name: linear for name, linear in self.awaited.items() if linear.blocks.grad is None}
        if self.is_armed:
            self.refuse(count)
            self.is_armed = False
            self.detach()

    def refuse(self, count: int) -> None:
        """Raise `SMTError` if some of the `count` chosen linears cannot get a gradient."""
        unused = [name for name in self.awaited if name in self.ran]
        silent = [name for name in self.awaited if name not in self.ran and self.around.get(name) in self.ran]
        if self.calls_are_known:
            silent = []
        if not (unused or silent):
            return
        reasons = [f"the model reads {list_projections(silent)} without calling them"] if silent else []
        reasons += [f"nothing uses the output of {list_projections(unused)}"] if unused else []
        raise SMTError(
            f"{len(unused) + len(silent)} of {count} linears with blocks get no gradient, so they would not be "
            f"trained: {' and '.join(reasons)}. No optimizer step was taken. Leave them out, as with exclude_modules="
            f"{sorted({name.rpartition('.')[2] for name in unused + silent})}, and choose the blocks again."
        )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Warn of blocks that were never trained."""
        if self.awaited:
            logger.warning(
                "No gradient reached the blocks of %s in %d steps; they are unchanged.",
                list_projections(list(self.awaited)),
                state.global_step,
            )
        self.awaited = {}

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.ran = [], set()
