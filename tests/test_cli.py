"""The console script `smt`."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from smt_trainer import __version__
from smt_trainer.cli import main

WITHOUT_TORCH = """
import sys
from smt_trainer.cli import main
try:
    main({arguments!r})
finally:
    heavy = {{"torch", "transformers", "numpy", "safetensors"}} & set(sys.modules)
    assert not heavy, heavy
"""


def test_merge_writes_the_merged_checkpoint(base, delta, tmp_path, capsys):
    folder, trained = delta
    assert main(["merge", str(base), str(folder), str(tmp_path / "merged")]) == 0
    assert f"merged checkpoint in {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(trained))


def test_inspect_says_what_a_delta_holds(delta, capsys):
    folder, trained = delta
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    selection = trained.smt_state.selection
    assert "score=random, scope=global, budget=12" in output
    assert selection.summary() in output
    for name, indices in selection.block_indices.items():
        (line,) = (line for line in output.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(f"{len(indices)} of {selection.grids[name].num_blocks}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "smt: no delta at nowhere"),
        (["merge", "base", "nowhere", "out"], "smt: no delta at nowhere"),
    ],
)
def test_bad_input_is_one_line_on_standard_error_and_status_1(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["unmerge"], ["merge", "base"]])
def test_a_command_line_that_cannot_be_parsed_is_refused_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: smt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "merge a delta into its base checkpoint"),
        (["merge", "--help"], "base checkpoint: a folder, or a name on the hub"),
        (["--version"], f"smt_trainer {__version__}"),
    ],
)
def test_help_needs_no_torch(arguments, expected):
    script = WITHOUT_TORCH.format(arguments=arguments)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout


def test_the_console_script_is_main():
    found = [script for script in entry_points(group="console_scripts") if script.name == "smt"]
    if not found:
        pytest.skip("the package is not installed")
    assert found[0].load() is main
