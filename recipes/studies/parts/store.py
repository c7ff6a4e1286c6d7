"""The results of all runs: one JSON object per line, appended as runs end."""

import json
from pathlib import Path

from recipes.studies.parts.run import Run


class Store:
    """Results by run, in one file that only grows. Of two results of a run the later one counts.

    Args:
        path: file to read and to append to; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[Run, dict] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))

    def __contains__(self, run: Run) -> bool:
        return run in self._results

    def __getitem__(self, run: Run) -> dict:
        return self._results[run]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, result: dict) -> None:
        """Keep a result of `perform`, and append it to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self._remember(result)

    def most_templates(self, task: str) -> int:
        """Return the largest number of question templates that a run of a task was tested on."""
        return max((number_of_templates(each) for run, each in self._results.items() if run.task == task), default=0)

    def _remember(self, result: dict) -> None:
        self._results[Run(**result["run"])] = result


def number_of_templates(result: dict) -> int:
    """Return how many templates the test questions of a result were made from; 0 for a task without templates."""
    return sum(len(set(templates)) for templates in result.get("templates", {}).values())
