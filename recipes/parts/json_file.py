"""JSON files with one line for each key, so that the values of thousands of questions stay compact."""

import json
from collections.abc import Mapping
from pathlib import Path

from smt_trainer.files import write_text


def write_json(path: Path, content: Mapping) -> None:
    """Write `content` to `path` atomically."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
