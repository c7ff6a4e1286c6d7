"""The benchmark of smt's commands, on a tiny model."""

import json

import pytest
import tiny
from texts import byte_tokenizer

from recipes.benchmarks import verbs


@pytest.mark.slow
def test_every_command_is_run_and_proven(tmp_path):
    tokenizer = byte_tokenizer()
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    verbs.main(["--output", str(tmp_path), "--model", str(tmp_path / "base")])
    results = json.loads((tmp_path / "verbs.json").read_text())
    assert results["proofs"] and all(results["proofs"].values())
    assert len(results["rows"]) == len(verbs.COMMANDS) + 2
    written = [row for row in results["rows"] if row["bytes"]]
    assert len(written) == sum(folder is not None for folder in verbs.COMMANDS.values())
    text = (tmp_path / "verbs.md").read_text()
    assert all(f"`{row['command']}`" in text for row in results["rows"]) and str(tmp_path) not in text
