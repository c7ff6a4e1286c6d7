"""What the arms of a study reached, on the test questions that all of them answered.

Questions drawn from one template are much alike, so a template counts once: its value is the mean over its questions,
and a mean or an interval is one over templates. A question without a template is a template of its own.

Runs of the same task answer the questions in the same order. Some answered fewer of them, so only those questions count
that every arm has answered.
"""

from collections.abc import Mapping
from statistics import mean

from recipes.studies.parts.comparison import difference
from recipes.studies.parts.study import Arm


class Outcomes:
    """The results of a study's finished arms.

    Attributes:
        results: arm -> the results of its runs, in the order of the seeds; arms without results are left out.
        columns: the measures and question sets of a test, in order.
        templates: measure and question set -> the template of each question that all arms answered.
    """

    def __init__(self, results: Mapping[Arm, list[dict]]) -> None:
        self.results = {arm: found for arm, found in results.items() if found}
        every = [result for found in self.results.values() for result in found]
        self.columns = [(measure, name) for measure, sets in every[0]["values"].items() for name in sets]
        self.templates = {
            column: common_start([_templates(result, *column) for result in every]) for column in self.columns
        }

    def seeds(self, arm: Arm) -> list[int]:
        """Return the seeds of the arm's runs."""
        return [result["run"]["seed"] for result in self.results[arm]]

    def by_template(self, arm: Arm, measure: str, name: str) -> list[list[float]]:
        """Return a row for each seed, with the mean of each template."""
        templates = self.templates[measure, name]
        return [_means(result["values"][measure][name], templates) for result in self.results[arm]]

    def means(self, arm: Arm, measure: str, name: str) -> list[float]:
        """Return the mean over the templates, for each seed."""
        return [mean(row) for row in self.by_template(arm, measure, name)]

    def difference(self, first: Arm, second: Arm, measure: str, name: str) -> tuple[float, float | None]:
        """Return `second` minus `first` with the seeds of both, and half the width of its 95 % interval.

        The half width is None with one seed, which does not tell how far another one would be.

        Raises:
            ValueError: they have no seed in common.
        """
        rows = [
            dict(zip(self.seeds(arm), self.by_template(arm, measure, name), strict=True)) for arm in (first, second)
        ]
        common = sorted(set.intersection(*map(set, rows)))
        if not common:
            raise ValueError(f"Expected seeds in common, got {self.seeds(first)} and {self.seeds(second)}.")
        value, half_width = difference(*([row[seed] for seed in common] for row in rows))
        return value, half_width if len(common) > 1 else None


def common_start(rows: list[list]) -> list:
    """Return what all rows begin with, which is the whole of the shortest one.

    Raises:
        ValueError: a row begins otherwise.
    """
    shortest = min(rows, key=len)
    if any(row[: len(shortest)] != shortest for row in rows):
        raise ValueError(
            "Expected the same questions in all runs, got others: they are of several versions of the data."
        )
    return shortest


def _templates(result: dict, measure: str, name: str) -> list[int]:
    values = result["values"][measure][name]
    return result.get("templates", {}).get(name) or list(range(len(values)))


def _means(values: list[float], templates: list[int]) -> list[float]:
    groups: dict[int, list[float]] = {}
    for template, value in zip(templates, values, strict=False):
        groups.setdefault(template, []).append(value)
    return [mean(group) for group in groups.values()]
