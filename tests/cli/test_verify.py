"""`smt verify`: what it prints, and its exit status."""

import json
import subprocess
import sys

import pytest
import tiny
from safetensors.torch import load_file, save_file

from smt_trainer import convert_to_smt, merge_checkpoint, save_delta
from smt_trainer.cli import main
from smt_trainer.model.checkpoint import SINGLE_FILE


@pytest.fixture
def command(base, delta, tmp_path):
    """Merge, and return the command that verifies it."""
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    return ["verify", str(base), str(delta[0]), str(tmp_path / "merged")]


def damage(command, key="lm_head.weight"):
    path = f"{command[-1]}/{SINGLE_FILE}"
    weights = load_file(path)
    weights[key][0, :3] += 1
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("flags", [[], ["--logits"]])
def test_a_proven_merge_gives_status_0_and_what_it_changed(flags, command, delta, capsys):
    assert main([*command, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained = f"{delta[1].smt_state.selection.trainable_parameters:,}"
    table = {line.split()[0]: line.split()[1:] for line in lines[: lines.index("")]}
    assert table["all"][1:] == [trained, trained] and "model.layers.0.self_attn.q_proj.weight" in table
    assert lines[-1] == f"verified: {command[-1]} is the base with the delta merged into it"
    assert any("KL 0 nats" in line and "differ by at most 0" in line for line in lines) == bool(flags)


def test_a_wrong_merge_gives_status_1_and_what_is_wrong(command, capsys):
    damage(command)
    # Logits could only repeat it.
    assert main([*command, "--logits"]) == 1
    output = capsys.readouterr().out
    assert "lm_head.weight is not trained, and 3 of 4,096 values are not the base's\n" in output
    assert output.splitlines()[-1].startswith("NOT verified: ") and "KL" not in output


def test_the_first_problems_are_printed_and_json_has_all(command, monkeypatch, capsys):
    monkeypatch.setattr("smt_trainer.cli.verify.MOST_LINES", 2)
    tiny.llama(seed=1).save_pretrained(command[-1])
    assert main(command) == 1
    output = capsys.readouterr().out
    assert main([*command, "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [f"{each['where']} {each['problem']}" in output for each in problems] == [True, True] + [False] * 14
    assert "\nand 14 more; --json lists all\nNOT verified: " in output


def test_the_result_for_machines(command, capsys):
    assert main([*command, "--json", "--logits"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["problems"], found["compared"]) == (True, [], 21)
    assert set(found["tensors"]["model.layers.0.self_attn.q_proj.weight"]) == {"values", "trained", "changed"}
    assert (found["logits"]["divergence"], found["logits"]["largest"], found["logits"]["agreement"]) == (0, 0, 1)
    damage(command)
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["logits"]) == (False, None)
    assert [each["where"] for each in found["problems"]] == ["lm_head.weight"]


def test_a_merged_folder_without_weights_is_not_verified(command, tmp_path, capsys):
    (tmp_path / "merged" / SINGLE_FILE).unlink()
    assert main(command) == 1
    assert capsys.readouterr().out.startswith("weights ")


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_folder_that_is_missing_gives_one_line_and_status_2(place, command, tmp_path, capsys):
    command[place] = str(tmp_path / "nowhere")
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("smt: ") and captured.err.count("\n") == 1 and not captured.out


def test_logits_of_a_classifier_are_refused_in_one_line(tmp_path, capsys):
    model = tiny.build("BertForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    command = ["verify", *(str(tmp_path / name) for name in ("base", "delta", "merged"))]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--logits"]) == 2
    assert "no logits over a vocabulary; leave out --logits" in capsys.readouterr().err


def test_the_exit_status_is_documented(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["verify", "--help"])
    assert "Exit status: 0 if the merge is proven; 1 if" in capsys.readouterr().out


def test_bytes_are_verified_without_torch(command):
    script = """import sys; from smt_trainer.cli import main
assert main(sys.argv[1:]) == 0
print(*{'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules))"""
    run = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "" and run.stderr == ""
