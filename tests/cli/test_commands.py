"""What all commands of `smt` have in common: help, `--json`, exit status."""

import json
import re
from dataclasses import fields

import pytest

from smt_trainer import BlockScores
from smt_trainer.cli import main
from smt_trainer.cli.inspect import KEYS_OF_TWO
from smt_trainer.cli.main import COMMANDS
from smt_trainer.estimation.cost import Cost

# In the words of each command `@` begins the name of a folder or file; in `broken`, one does not exist.
RESULTS = {
    "select": "select --scores @scores.safetensors --output @out",
    "inspect": "inspect @delta0",
    "merge": "merge @base @delta0 @out",
    "verify": "verify @base @delta0 @merged",
    "unmerge": "unmerge @base @delta0 @merged @out",
    "extract": "extract @base @merged @out --block-size 16",
    "diff": "diff @delta0 @delta1",
    "compose": "compose @base @delta0 @delta1 @out",
    "export": "export @base @delta0 @out --format lora",
    "estimate": "estimate @base --seq 8 --budget 4",
}
KEYS = dict(zip(RESULTS, (command.KEYS for command in COMMANDS if hasattr(command, "KEYS")), strict=True))
BLOCKS = {"blocks", "parameters", "of_model", "of_targets", "projections"}


def words(line, folder):
    return [str(folder / word[1:]) if word.startswith("@") else word for word in line.split()]


def help_of(capsys, *command):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def result(capsys, folder, line):
    """Run a command with --json; return all that it prints, read."""
    assert main([*words(line, folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.parametrize("command", RESULTS)
def test_a_result_for_machines_has_the_keys_in_the_help(command, folder, capsys):
    found = result(capsys, folder, RESULTS[command])
    assert found.keys() == KEYS[command].keys()
    documented = help_of(capsys, command).partition("Its keys: ")[2].partition(". With OTHER: ")[0]
    assert re.findall(r"(?:^|; )(\w+) \(", documented) == list(found)
    if "output" in found:
        assert found["output"] == str(folder / "out") and any((folder / "out").iterdir())
    if "selection" in found:
        assert found["selection"].keys() == BLOCKS
        assert found["selection"]["blocks"] == sum(found["selection"]["projections"].values()) > 0


def test_the_result_of_inspect_says_what_each_kind_has(folder, capsys):
    BlockScores.load(folder / "scores.safetensors").select().save(folder / "selection.json")
    kinds = {"delta": "delta0", "scores": "scores.safetensors", "selection": "selection.json"}
    lacking = {}
    for kind, name in kinds.items():
        found = result(capsys, folder, f"inspect @{name}")
        assert found["kind"] == kind and found["config"]["score"] == "random"
        lacking[kind] = {key for key, value in found.items() if value is None}
    of_delta = {"fingerprint", "weight_dtype", "whole"}
    assert lacking["selection"] == {"base", "quantization", "scores", *of_delta}
    assert lacking["scores"] == lacking["selection"] - {"scores"}
    assert lacking["delta"] == lacking["selection"] - of_delta


def test_the_result_of_inspecting_two_has_other_keys(folder, capsys):
    found = result(capsys, folder, "inspect @scores.safetensors @scores.safetensors")
    assert found.keys() == KEYS_OF_TWO.keys()
    assert found["total"] == {"first": 12, "second": 12, "shared": 12, "jaccard": 1, "spearman": pytest.approx(1)}
    assert all(f"{key} (" in help_of(capsys, "inspect").partition("With OTHER: ")[2] for key in KEYS_OF_TWO)


def test_a_number_that_json_lacks_is_null(folder, capsys):
    scores = BlockScores.load(folder / "scores.safetensors")
    alike = {name: values * 0 + 1 for name, values in scores.scores.items()}
    BlockScores(scores.grids, alike, scores.num_parameters, scores.config).save(folder / "alike.safetensors")
    found = result(capsys, folder, "inspect @scores.safetensors @alike.safetensors")
    assert found["total"]["spearman"] is None


def test_the_result_of_estimate_has_the_costs_of_each_step(folder, capsys):
    found = result(capsys, folder, "estimate @base --seq 8 --budget 4 --score random")
    assert found["warmup"] is None and found["fits"] is True
    assert set(found["smt"]) == set(found["lora"]) == set(found["full"]) == {field.name for field in fields(Cost)}
    assert result(capsys, folder, "estimate @base --seq 8 --budget 4 --card 1e-6")["fits"] is False


@pytest.mark.parametrize("command", RESULTS)
def test_an_error_gives_one_line_and_status_2(command, folder, capsys):
    line = re.sub(r"@(base|scores.safetensors)|(?<=^inspect )@delta0|(?<=^diff )@delta0", "@nowhere", RESULTS[command])
    for flags in ([], ["--json"]):
        assert main([*words(line, folder), *flags]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("smt: ") and captured.err.count("\n") == 1 and not captured.out
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", [*RESULTS, "completion"])
def test_a_wrong_command_line_gives_the_usage_and_status_2(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--no-such-flag"])
    assert capsys.readouterr().err.startswith(f"usage: smt {command}")


def test_the_help_names_every_command_and_the_exit_status(capsys):
    said = help_of(capsys)
    assert all(f" {command} " in said for command in (*RESULTS, "completion"))
    assert "Exit status: 0 for success; 1 if the answer is no (smt verify); 2 for an error" in said
