"""A study: a question, and the arms whose runs answer it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.run import Run
from recipes.studies.parts.store import Store, number_of_templates
from recipes.studies.parts.tuning import Tuning, tune

TUNING_SEED = 0
SEEDS = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class Arm:
    """One setting of a study.

    Attributes:
        label: name of the arm in the tables.
        method: key of `METHODS`, or "none" for the untuned model.
        budget: trained parameters as a fraction of the model's; None where a method has none.
        fields: fields of SMTConfig that differ from the method's.
        selected_on: as in `Run`.
        dtype: as in `Run`.
        records: number of records to train on, if not the protocol's.
        rate_of: the arm whose tuned rate this one takes; None tunes its own.
        seeds: seeds of its final runs.
    """

    label: str
    method: str
    budget: float | None = None
    fields: dict = field(default_factory=dict)
    selected_on: str | None = None
    dtype: str = "bfloat16"
    records: int | None = None
    rate_of: "Arm | None" = None
    seeds: tuple[int, ...] = SEEDS

    def run(self, task: str, rate: float, seed: int, split: str) -> Run:
        """Return one run of this arm."""
        protocol = PROTOCOLS[task]
        batch, steps = protocol.batch, self.records // protocol.batch if self.records else protocol.steps
        fields = json.dumps(self.fields, sort_keys=True)
        return Run(
            task, self.method, self.budget, rate, seed, split, steps, batch, fields, self.selected_on, self.dtype
        )

    def tuning(self, task: str, store: Store) -> Tuning:
        """Return the search for this arm's rate."""
        arm = self.rate_of or self
        return tune(lambda rate: arm.run(task, rate, TUNING_SEED, "validation"), store, PROTOCOLS[task].objective)

    def missing(self, task: str, store: Store) -> Iterator[Run]:
        """Yield the runs that are still to do, as far as they are known."""
        searched = [] if self.method == "none" else self.tuning(task, store).missing
        yield from (run for run in [*searched, *self._to_report(task, store)] if run not in store)

    def reported(self, task: str, store: Store) -> list[Run]:
        """Return the runs that are reported and done, in the order of the seeds."""
        return [run for run in self._to_report(task, store) if run in store]

    def _to_report(self, task: str, store: Store) -> list[Run]:
        """Return the runs to report; none while the rate is not known."""
        if self.method == "none":
            return [self.untuned(task)]
        rate = self.tuning(task, store).rate
        return [] if rate is None else self.final(task, rate)

    def final(self, task: str, rate: float) -> list[Run]:
        """Return the runs that are reported, one per seed."""
        return [self.run(task, rate, seed, "test") for seed in self.seeds]

    def untuned(self, task: str) -> Run:
        """Return the run that measures the model as it is."""
        return Run(task, "none", None, 0.0, 0, "test", 0, 0)


UNTUNED = Arm("untuned", "none")


@dataclass(frozen=True)
class Study:
    """A question and its arms.

    Attributes:
        name: name of the study on the command line.
        question: what the study asks, one sentence.
        arms: in the order of the table. The first one trained is compared with all others.
        task: name of the task.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    task: str = "math"

    def missing(self, store: Store) -> Iterator[Run]:
        """Yield the runs that are still to do, as far as they are known."""
        for arm in self.arms:
            yield from arm.missing(self.task, store)

    def narrow(self, store: Store) -> Iterator[Run]:
        """Yield the finished runs whose test had questions of fewer templates than others of the task."""
        most = store.most_templates(self.task)
        for arm in self.arms:
            for run in arm.reported(self.task, store):
                if number_of_templates(store[run]) < most:
                    yield run
