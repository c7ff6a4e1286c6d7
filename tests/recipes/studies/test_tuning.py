import math
from dataclasses import asdict

import pytest

from recipes.studies.parts.run import Run
from recipes.studies.parts.store import Store
from recipes.studies.parts.tuning import RATES, tune


def run_with(rate: float) -> Run:
    return Run("math", "smt", 0.0084, rate, 0, "validation", 100, 8)


def search(tmp_path, loss_of):
    """Make every missing run until a rate is found. Return the search and the rates tried, in order."""
    store, tried = Store(tmp_path / "runs.jsonl"), []
    while (found := tune(run_with, store, lambda result: result["loss"])).rate is None:
        for run in found.missing:
            store.add({"run": asdict(run), "loss": loss_of(run.rate)})
            tried.append(run.rate)
    return found, tried


@pytest.mark.parametrize("best", RATES[1:-1])
def test_the_search_finds_the_best_rate_and_tries_both_its_neighbours(best, tmp_path):
    found, tried = search(tmp_path, lambda rate: abs(math.log(rate / best)))
    place = RATES.index(best)
    assert found.rate == best
    assert not found.at_edge
    assert {RATES[place - 1], best, RATES[place + 1]} <= set(tried)
    assert 4 <= len(tried) == len(set(tried))


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    found, _ = search(tmp_path, lambda rate: math.inf if rate > 3e-4 else -rate)
    assert found.rate == 3e-4


def test_the_end_of_the_grid_is_named(tmp_path):
    found, _ = search(tmp_path, lambda rate: -rate)
    assert found.rate == RATES[-1]
    assert found.at_edge
