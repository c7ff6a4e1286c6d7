"""Give a trainer the state of its first step, for a warm-up that runs before that step.

A loss may be annealed by `state.global_step / state.max_steps`, or read the learning rate. So in the warm-up the state
is that of step 0, and a schedule exists, over a dummy optimizer. All are restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import has_length


@contextlib.contextmanager
def at_first_step(trainer: Trainer, loader, steps: int) -> Generator[None]:
    """Give a trainer the state, optimizer and schedule of its first step within this context.

    Args:
        trainer: before its main loop.
        loader: its training data.
        steps: the number of steps, if neither the data nor the arguments determine it.
    """
    before = {name: getattr(trainer, name) for name in ("state", "control", "optimizer", "lr_scheduler")}
    trainer.state = _first_state(trainer, loader, steps)
    trainer.control = copy.copy(trainer.control)
    try:
        if trainer.optimizer is None:
            nothing = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in ("decayed", "not decayed")]
            trainer.optimizer = torch.optim.SGD(nothing, lr=trainer.args.learning_rate)
            trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
        yield
    finally:
        vars(trainer).update(before)


def _first_state(trainer: Trainer, loader, steps: int) -> TrainerState:
    epochs, is_sized = 1, has_length(loader)
    if is_sized or trainer.args.max_steps > 0:
        epochs, *_, steps = trainer.set_initial_training_values(trainer.args, loader)
    state = TrainerState()
    state.train_batch_size = trainer.args.train_batch_size
    state.compute_steps(trainer.args, steps)
    state.init_training_references(trainer, steps, epochs, None)
    return state
