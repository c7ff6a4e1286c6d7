"""Check, in the first training step, that only a linear's own product reads a weight with blocks.

The blocks get their gradient in that product. A loss that multiplies by a head's weight itself, or that has a penalty
on weights, uses the values of the blocks and would give them no gradient. So in the first step these weights require a
gradient, too. The products give them none: a gradient that arrives comes from another reader, which is refused.

Not seen: readers of weights that are sharded, quantised or an expert's, and readers in a compiled model.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from smt_trainer.errors import SMTError
from smt_trainer.model.names import list_projections
from smt_trainer.sparse.block_module import BlockModule, block_modules


class RefuseWeightReaders(TrainerCallback):
    """Refuses the first optimizer step if a weight with blocks got a gradient of its own. The trainer installs it."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.handles: list[RemovableHandle] = []
        self.read: set[str] = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Make the weights require a gradient."""
        self.detach()
        if model is None or args.torch_compile:
            return
        for name, linear in block_modules(model):
            if _can_watch(linear):
                self.weights.append(linear.weight.requires_grad_())
                self.handles.append(linear.weight.register_hook(functools.partial(self.note, name)))

    def note(self, name: str, gradient: Tensor | None) -> None:
        """Note a gradient of a weight; the products give None."""
        if gradient is not None:
            self.read.add(name)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """All backward passes of the first step are done."""
        read = sorted(self.read)
        self.detach()
        if read:
            leaves = sorted({name.rpartition(".")[2] for name in read})
            raise SMTError(
                f"the model or its loss reads the weights of {list_projections(read)} outside their own products, so "
                "their blocks would lack a part of their gradient. No optimizer step was taken. Choose no blocks in "
                f"them, as with exclude_modules={leaves}, or train them whole, with modules_to_save={leaves}."
            )

    def detach(self) -> None:
        """Remove the hooks, and freeze the weights again."""
        for handle in self.handles:
            handle.remove()
        for weight in self.weights:
            weight.requires_grad_(False)
            weight.grad = None
        self.handles, self.weights, self.read = [], [], set()


def _can_watch(linear: BlockModule) -> bool:
    plain = linear.weight_holds_blocks and linear.stacked is None and type(linear.weight) is nn.Parameter
    # A weight that the user has unfrozen stays so; on saving, a warning says that only its blocks are trained.
    return plain and not linear.weight.requires_grad
