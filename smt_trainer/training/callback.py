"""`SMTCallback`: the events of SMT in a training run, with progress bar and log."""

from __future__ import annotations

import logging
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback

from smt_trainer.selection.block_selection import BlockSelection

logger = logging.getLogger(__name__)


class SMTCallback(TrainerCallback):
    """Subclass this, and pass yours in `callbacks=`, to act on the events of SMT.

    Besides the events of `TrainerCallback` there are `on_warmup_begin`, `on_warmup_step`, `on_warmup_end` and
    `on_selection`, which come before the stock training loop begins. This class shows the progress of the warm-up;
    nothing else depends on it, so a subclass need not call `super()`.
    """

    progress: tqdm | None = None
    began: float = 0.0

    def on_warmup_begin(self, args, num_steps: int) -> None:
        """The gradient warm-up begins; it has `num_steps` steps."""
        self.began = time.perf_counter()
        if args.should_log and args.disable_tqdm:
            logger.info("The gradient warm-up begins: %d steps.", num_steps)
        hidden = args.disable_tqdm or not args.should_log
        self.progress = tqdm(total=num_steps, desc="SMT warm-up", disable=hidden, unit="step")

    def on_warmup_step(self, args, step: int, loss: float) -> None:
        """Warm-up step `step` (from 0) is done; `loss` is that of its batch on this rank."""
        if self.progress is not None:
            self.progress.update()
            self.progress.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def on_warmup_end(self, args) -> None:
        """The warm-up ended or failed."""
        if self.progress is not None:
            self.progress.close()
        if args.should_log and args.disable_tqdm:
            logger.info("The gradient warm-up ended after %.1f s.", time.perf_counter() - self.began)

    def on_selection(self, args, selection: BlockSelection) -> None:
        """The blocks are chosen; the model is about to be rewritten."""
        if args.should_log:
            logger.info("SMT trains %s.", selection.summary())
