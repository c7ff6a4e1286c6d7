"""The results of all runs: one JSON object per line, appended as runs end."""

import json
from pathlib import Path

from recipes.studies.parts.run import Run


class Store:
    """Results by run, in one file that only grows.

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

    def _remember(self, result: dict) -> None:
        self._results[Run(**result["run"])] = result
