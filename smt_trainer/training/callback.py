"""`SMTCallback`: what SMT does and says at each event of a training run."""

from __future__ import annotations

import logging

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.linear import BlockLinear, smt_linears, write_back

logger = logging.getLogger(__name__)


class SMTCallback(TrainerCallback):
    """Installed by `SMTTrainerMixin`. Subclass it, and pass yours in `callbacks=`, to act on the events of SMT.

    Besides the events of `TrainerCallback` there are `on_warmup_begin`, `on_warmup_step`, `on_warmup_end` and
    `on_selection`, which the trainer calls before the stock training loop begins.
    """

    def __init__(self) -> None:
        self.trainer = None
        self.progress: tqdm | None = None
        self.losses: list[float] = []
        self.report: dict[str, float] = {}
        self._layers: tuple[nn.Module | None, list[BlockLinear]] = (None, [])

    def on_warmup_begin(self, args, num_steps: int) -> None:
        """The gradient warm-up begins; it has `num_steps` steps."""
        hidden = args.disable_tqdm or not args.should_log
        self.progress = tqdm(total=num_steps, desc="SMT warm-up", disable=hidden, unit="step")
        self.losses = []

    def on_warmup_step(self, args, step: int, loss: float) -> None:
        """Warm-up step `step` (from 0) is done; `loss` is that of its batch on this rank."""
        self.losses.append(loss)
        self.progress.update()
        self.progress.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def on_warmup_end(self, args) -> None:
        """The warm-up is over, also when it failed."""
        self.progress.close()

    def on_selection(self, args, selection: BlockSelection) -> None:
        """The blocks are chosen; the model is about to be rewritten."""
        if args.should_log:
            logger.info("SMT trains %s.", selection.summary())
        self.report = {"smt_blocks": selection.num_blocks, "smt_fraction_of_model": selection.fraction_of_model}
        if self.losses:
            self.report["smt_warmup_steps"] = len(self.losses)
            self.report["smt_warmup_loss"] = sum(self.losses) / len(self.losses)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Log the warm-up's results once, since reporters are set up only now."""
        # DeepSpeed may just have loaded blocks.
        write_back(self._layers_of(model))
        if self.report:
            self.trainer.log(self.report)
            self.report = {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Bring the dense weights, which forward reads, up to date with the blocks that were just stepped."""
        write_back(self._layers_of(model))

    def _layers_of(self, model: nn.Module) -> list[BlockLinear]:
        """The rewritten linears of a model, looked for once."""
        if self._layers[0] is not model:
            self._layers = (model, [layer for _, layer in smt_linears(model)])
        return self._layers[1]
