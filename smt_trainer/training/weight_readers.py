"""Check, in the first training step, that only a linear's own product reads a weight with blocks.

The blocks get their gradient in that product. A loss that multiplies by a head's weight itself, or that has a penalty
on weights, uses the values of the blocks and would give them no gradient. So in forward and backward of the first step
these weights require a gradient, too. The products give them none: a gradient that arrives comes from another reader,
which is refused.

Not seen: readers of weights that are sharded, quantised, an expert's or have hooks of the user's, readers in a compiled
model, and those that begin after the first step, such as a penalty that is switched on later.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator

from torch import Tensor, nn
from transformers import TrainerCallback

from smt_trainer.errors import SMTError, first_line
from smt_trainer.model.names import list_projections
from smt_trainer.sparse.block_module import BlockModule, block_modules


class RefuseWeightReaders(TrainerCallback):
    """Refuses the first optimizer step if a weight with blocks got a gradient of its own. The trainer installs it."""

    def __init__(self) -> None:
        self.linears: dict[str, BlockModule] = {}
        self.read: set[str] = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Watch the first step."""
        self.forget()
        if model is not None and not args.torch_compile:
            self.linears = {name: linear for name, linear in block_modules(model) if _can_watch(linear)}

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Make the weights require a gradient within this context, and note those that get one; in the first step only.

        The trainer runs each forward and backward in it, so that callbacks and loggers see the weights frozen.
        """
        weights = {name: linear.weight for name, linear in self.linears.items()}
        handles = [
            weight.requires_grad_().register_hook(functools.partial(self.note, name))
            for name, weight in weights.items()
        ]
        try:
            yield
        except RuntimeError as error:
            if not (weights and "used in the graph" in str(error)):
                raise
            raise SMTError(
                f"{first_line(error)} In the first step, weights that hold blocks require a gradient, too, and get "
                "none. If torch.autograd.grad is asked for the gradients of all that is trained, take the parameters "
                "whose names end in `.blocks`, or pass allow_unused=True."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None

    def note(self, name: str, gradient: Tensor | None) -> None:
        """Note a gradient of a weight; the products give None."""
        if gradient is not None:
            self.read.add(name)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """All backward passes of the first step are done."""
        read = sorted(self.read)
        self.forget()
        if read:
            leaves = sorted({name.rpartition(".")[2] for name in read})
            raise SMTError(
                f"the model or its loss reads the weights of {list_projections(read)} outside their own products, so "
                "their blocks would lack a part of their gradient. No optimizer step was taken. Choose no blocks in "
                f"them, as with exclude_modules={leaves}, or train them whole, with modules_to_save={leaves}. A "
                "penalty on trained parameters should take those whose names end in `.blocks`, since in the first step "
                "these weights require a gradient, too."
            )

    def forget(self) -> None:
        """Watch no further step."""
        self.linears, self.read = {}, set()


def _can_watch(linear: BlockModule) -> bool:
    plain = linear.weight_holds_blocks and linear.stacked is None and type(linear.weight) is nn.Parameter
    # A weight that the user has unfrozen stays so; on saving, a warning says that only its blocks are trained.
    # Hooks of the user's would be called with the None that the products give.
    return plain and not linear.weight.requires_grad and not linear.weight._backward_hooks
