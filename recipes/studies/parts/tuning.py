"""The learning rate of each method, found by the same search for all, judged on validation questions.

The search begins with two rates of a grid whose steps are factors of about 3. It goes on until both neighbours of the
best rate and at least four rates in all have been tried; a rate beyond the neighbours is on the side that does better.
"""

from collections.abc import Callable
from typing import NamedTuple

from recipes.studies.parts.run import Run
from recipes.studies.parts.store import Store

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START, LEAST = (1e-3, 3e-3), 4


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
    runs = {rate: run_with(rate) for rate in RATES}
    losses = {rate: objective(store[run]) for rate, run in runs.items() if run in store}
    missing = [runs[rate] for rate in _wanted(losses) if rate not in losses]
    return Tuning(losses, missing, None if missing else _best(losses))


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def _wanted(losses: dict[float, float]) -> list[float]:
    """Return the rates that the search needs, as far as the losses so far tell."""
    if len(losses) < len(START):
        return list(START)
    first, best, last = (RATES.index(rate) for rate in (min(losses), _best(losses), max(losses)))
    wanted = [RATES[place] for place in (best - 1, best + 1) if 0 <= place < len(RATES)]
    if len(losses) < LEAST and all(rate in losses for rate in wanted):
        lower = last + 1 == len(RATES) or (first > 0 and losses[RATES[first]] < losses[RATES[last]])
        wanted.append(RATES[first - 1 if lower else last + 1])
    return wanted
