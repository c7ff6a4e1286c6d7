"""The learning rate of each method: the same grid for all, judged on validation questions.

The grid starts at four rates. While the best rate lies at an edge of those tried, the next rate beyond it is tried too.
"""

from collections.abc import Callable
from typing import NamedTuple

from recipes.studies.parts.run import Run
from recipes.studies.parts.store import Store

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST, LAST = 4, 7


class Tuning(NamedTuple):
    """How far the search for a rate has come.

    Attributes:
        losses: rate -> what the protocol minimises, on the validation questions, of the runs that are done.
        missing: the runs to do before the search can go on.
        rate: the best rate; None while runs are missing.
    """

    losses: dict[float, float]
    missing: list[Run]
    rate: float | None

    @property
    def at_edge(self) -> bool:
        """Return whether the best rate is the smallest or largest of all that could be tried."""
        return self.rate in (RATES[0], RATES[-1])


def tune(run_with: Callable[[float], Run], store: Store, objective: Callable[[dict], float]) -> Tuning:
    """Return the state of the search.

    Args:
        run_with: rate -> the tuning run with this rate.
        store: the results so far.
        objective: result of a tuning run -> what to minimise.
    """
    first, last = FIRST, LAST
    while True:
        runs = {rate: run_with(rate) for rate in RATES[first : last + 1]}
        losses = {rate: objective(store[run]) for rate, run in runs.items() if run in store}
        missing = [run for rate, run in runs.items() if rate not in losses]
        if missing:
            return Tuning(losses, missing, None)
        best = RATES.index(min(losses, key=losses.__getitem__))
        if best == first > 0:
            first -= 1
        elif best == last < len(RATES) - 1:
            last += 1
        else:
            return Tuning(losses, [], RATES[best])
