"""Write what a benchmark measured: the numbers as JSON, the tables as Markdown."""

import json
from pathlib import Path

from smt_trainer.files import write_text


def write_results(folder: Path, stem: str, results: dict | list, text: str) -> None:
    """Write `stem`.json and .md into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{stem}.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / f"{stem}.md", text)
