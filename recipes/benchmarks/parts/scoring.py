"""A warm-up step for one score."""

from torch import Tensor, nn

from recipes.benchmarks.parts.setting import Setting
from smt_trainer import SMTConfig
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import make_scorer


class Scoring:
    """A frozen model and a scorer of its targets with the default blocks."""

    def __init__(self, model: nn.Module, score: str, targets: str) -> None:
        self.model = model.requires_grad_(False)
        config = SMTConfig(score=score, target_modules=targets)
        found = find_targets(model, config)
        self.scorer = make_scorer(found, target_grids(found, config), config)

    def step(self, tokens: Tensor) -> None:
        """Run forward, and backward if the score needs it. The class of a sequence is its first token."""
        self.scorer.begin_batch({"labels": tokens})
        with self.scorer.attached():
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            if self.scorer.needs_backward:
                loss.backward()

    @property
    def accumulator_bytes(self) -> int:
        """The bytes of the scorer's sums."""
        return sum(total.nbytes for total in self.scorer.statistics())


def start(score: str, model: nn.Module, setting: Setting) -> Scoring:
    """Make a `Scoring`, with the arguments in the order that `functools.partial(start, score)` needs."""
    return Scoring(model, score, setting.targets)
