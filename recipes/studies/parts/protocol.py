"""How the runs of a task are trained, measured and judged: the same for every method."""

import math
from statistics import mean
from typing import NamedTuple


class Protocol(NamedTuple):
    """The protocol of one task.

    Attributes:
        steps: optimizer steps.
        batch: records in a step.
        measure: what tuning minimises, or for an accuracy maximises.
        validation: number of validation questions of each set.
        test: largest number of test questions of each set.
        sets: the validation sets that tuning counts, those with questions like the training records; all if empty.
    """

    steps: int
    batch: int
    measure: str
    validation: int
    test: int
    sets: tuple[str, ...] = ()

    def objective(self, result: dict) -> float:
        """Return what tuning minimises: the mean over the sets that count; infinity if training diverged."""
        means = result["means"][self.measure]
        value = mean(means[name] for name in self.sets or means)
        if math.isnan(value):
            return math.inf
        return -value if self.measure.startswith("accuracy") else value


PROTOCOLS = {
    "math": Protocol(48, 4, "loss", validation=60, test=100, sets=("new numbers",)),
    "sentiment": Protocol(48, 4, "loss", validation=100, test=300),
    "commonsense": Protocol(1000, 32, "accuracy by likelihood", validation=50, test=250),
}
"""Task -> protocol. No answers are generated: so few steps do not teach a 135M model to solve problems."""
