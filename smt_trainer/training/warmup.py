"""The gradient warm-up of a trainer: scores from the first batches of the main loop, with no trace left behind.

It replays the beginning of the main loop on the bare model, before Trainer makes an optimizer or wraps anything: the
same batches, the same `training_step`, the same mixed precision, in the state of step 0. Logs of the warm-up are
dropped. Afterwards random states, counters and the model's buffers are as before, so the main loop starts as if nothing
had run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import pick_targets
from smt_trainer.scores import SCORERS, Scorer, make_scorer
from smt_trainer.scores.collect import reached_scores, scoring
from smt_trainer.training.class_column import collating_classes
from smt_trainer.training.distributed import bare_backward, warmup_model
from smt_trainer.training.first_step import at_first_step
from smt_trainer.training.loss_scale import LossScale
from smt_trainer.training.preserved import generators_preserved, plain_data_preserved, reachable, rng_preserved

if TYPE_CHECKING:
    from smt_trainer.training.trainer import SMTTrainerMixin


class Warmup:
    """The warm-up of one trainer: `Warmup(trainer, grids).run()`.

    Args:
        trainer: an `SMTTrainerMixin`, before its main loop.
        grids: module name -> grid, for every target.

    Attributes:
        losses: the loss of each step on this rank.
    """

    def __init__(self, trainer: SMTTrainerMixin, grids: dict[str, BlockGrid]) -> None:
        self.trainer, self.grids = trainer, grids
        self.config, self.accelerator = trainer.smt_config, trainer.accelerator
        self.kind = SCORERS[self.config.score]
        scales_loss = self.kind.needs_backward and self.accelerator.mixed_precision == "fp16"
        self.scale = LossScale() if scales_loss else None
        self.losses: list[float] = []

    def run(self) -> dict[str, Tensor]:
        """Run the warm-up; return the scores of all blocks of the targets that it reached, the same on every rank.

        If the score needs no batch, none is run.

        Raises:
            SMTError: the training data gives no batch, no target was reached, or a gradient overflowed in every step.
        """
        if not self.kind.needs_warmup:
            return self.scorer(self.trainer.model).scores()
        with warmup_model(self.trainer.model, self.accelerator) as model:
            scorer = self.scorer(model)
            by_step = self.scale is not None
            with self.as_in_training() as batches, scoring(model, scorer, by_step=by_step) as reach:
                for step, (micro_batches, num_items) in enumerate(batches):
                    self.losses.append(self.step(model, scorer, micro_batches, num_items))
                    if self.scale is not None:
                        self.scale.settle(scorer)
                    self.tell("on_warmup_step", step, self.losses[-1])
            if self.scale is not None:
                self.scale.report()
            return reached_scores(scorer, reach)

    def scorer(self, model: nn.Module) -> Scorer:
        """Return the configured scorer for the targets in a model, wrapped or not."""
        targets = pick_targets(model, self.grids)
        return make_scorer(targets, self.grids, self.config, self.trainer.args.seed)

    @contextlib.contextmanager
    def as_in_training(self) -> Generator[Iterator[tuple[list, Tensor | int | None]]]:
        """Make the trainer's methods work on the bare model; leave no trace in the trainer or the random states.

        Yields the micro-batches of each step in the order of the main loop, epoch after epoch, and their number of
        labels.
        """
        trainer, steps = self.trainer, self.config.smt_warmup_steps
        self.tell("on_warmup_begin", steps)
        trainer.is_in_warmup = True
        try:
            backward = bare_backward(self.accelerator, self.scale, self.kind.needs_backward)
            preserved = plain_data_preserved(trainer, apart=(trainer.train_dataset, trainer.eval_dataset))
            generators = generators_preserved(trainer, *reachable(trainer.data_collator, trainer.train_dataset))
            with rng_preserved(), generators, preserved, backward:
                with collating_classes(trainer, self.kind.class_column(self.config)):
                    loader = trainer.get_train_dataloader()
                with at_first_step(trainer, loader, steps):
                    yield itertools.islice(self.epochs(loader), steps)
        finally:
            self.trainer.is_in_warmup = False
            self.tell("on_warmup_end")

    def epochs(self, loader) -> Iterator[tuple[list, Tensor | int | None]]:
        """Yield the steps of `as_in_training`, endlessly. Raise `SMTError` if an epoch has no batch."""
        for epoch in itertools.count():
            # accelerate does not pass the epoch on to a batch sampler that it shards.
            for part in (loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            iterator, is_empty = iter(loader), True
            while True:
                args = self.trainer.args
                step = self.trainer.get_batch_samples(iterator, args.gradient_accumulation_steps, args.device)
                if not step[0]:
                    break
                is_empty = False
                yield step
            if is_empty:
                raise SMTError("the training data gave no batch; the warm-up needs at least one. Check train_dataset.")

    def step(self, model: nn.Module, scorer: Scorer, micro_batches: list, num_items: Tensor | int | None) -> float:
        """Run one step as the trainer does, without an optimizer; return its loss on this rank."""
        self.trainer.current_gradient_accumulation_steps = len(micro_batches)
        loss = 0.0
        for inputs in micro_batches:
            scorer.begin_batch(inputs)
            loss += self.trainer.training_step(model, inputs, num_items)
        return float(loss)

    def tell(self, event: str, *details) -> None:
        """Call an event of every `SMTCallback`."""
        for callback in self.trainer.smt_callbacks:
            getattr(callback, event)(self.trainer.args, *details)
