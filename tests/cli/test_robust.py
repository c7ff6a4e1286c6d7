"""The command line under odd files, odd values, signals and closed pipes: one line, never a traceback."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch

from smt_trainer import BlockScores, convert_to_smt, save_delta
from smt_trainer.cli import main
from smt_trainer.delta.delta import Delta

SMT = [sys.executable, "-c", "import sys; from smt_trainer.cli import main; sys.exit(main())"]


def refused(arguments, capsys) -> str:
    """Run `smt`, which refuses in one line or with its usage, with status 2; return what it says."""
    try:
        status = main(arguments)
    except SystemExit as exit:
        assert exit.code == 2
        return capsys.readouterr().err
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("smt: ") and said.count("\n") == 1 and said[:-1].isprintable()
    return said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-modules", "("], "is not a regular expression"),
        (["--target-modules", "(?P<n>a)(?P<n>b)"], "is not a regular expression"),
        (["--block-size", "²"], "block_size must be"),
        (["--block-size", "0x16"], "block_size must be"),
        (["--budget", "nan"], "budget must be"),
        (["--budget", "inf"], "budget must be"),
        (["--budget", "9" * 5000], "budget must be"),
        (["--budget", "1e-400"], "budget must be"),
        (["--layer-cap", "-1"], "layer_cap must be"),
        (["--lowest-layer", "²"], "invalid int value"),
    ],
)
def test_odd_values_of_fields_are_refused(options, message, scores, tmp_path, capsys):
    command = ["select", "--scores", str(scores), "--output", str(tmp_path / "out"), *options]
    assert message in refused(command, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        *(["--card", "nan"], ["--card", "inf"], ["--card", "-1"], ["--batch", "0"], ["--seq", "²"]),
        *(["--ranks", "9" * 30], ["--bits", "5"], ["--bits", "-4"]),
    ],
)
def test_odd_numbers_are_refused(options, base, capsys):
    assert options[0] in refused(["estimate", str(base), *options], capsys)


@pytest.mark.parametrize(
    "config",
    [
        *("[]", "7", "{", "\ud800", '{"model_type": "llama", "hidden_size": "many"}', '{"model_type": ["llama"]}'),
        *('{"model_type": "llama", "num_attention_heads": 0}', '{"model_type": "llama", "hidden_size": -64}'),
        *('{"model_type": "nothing\\u001b[2J"}', '{"model_type": "llama", "hidden_size": 63, "head_dim": 5}'),
    ],
)
def test_an_odd_configuration_is_refused(config, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    refused(["estimate", str(tmp_path / "model"), "--batch", "1", "--seq", "4"], capsys)
    (tmp_path / "data").write_text('[{"text": "a"}]')
    refused(["select", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--output", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'[{"text": NaN}]',
        b'[{"text": "\\ud800"}]',
        b"\xff\xfe",
        b"[9" + b"9" * 5000,
    ],
)
def test_data_that_are_no_text_are_refused(data, tmp_path, capsys):
    (tmp_path / "data").write_bytes(data)
    refused(["select", "model", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")], capsys)


def test_escape_sequences_from_files_do_not_reach_the_terminal(delta, tmp_path, capsys):
    stored = Delta.load(delta[0])
    object.__setattr__(stored.selection, "base_model", "\x1b[2Jbase\x07\n\u202e")
    stored.save(tmp_path / "odd")
    assert main(["inspect", str(tmp_path / "odd")]) == 0
    output = capsys.readouterr().out
    assert r"\x1b[2Jbase\x07\n\u202e" in output and all(line.isprintable() for line in output.splitlines())
    (tmp_path / "a\x1b[2J\n.json").write_text("{")
    refused(["inspect", str(tmp_path / "a\x1b[2J\n.json")], capsys)


def test_an_interrupt_gives_one_line_and_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("smt_trainer.delta.delta.Delta.load", interrupt)
    assert main(["inspect", "delta"]) == 130
    assert capsys.readouterr().err == "smt: interrupted\n"


def test_a_merge_that_is_interrupted_leaves_nothing(base, delta, tmp_path):
    # The interrupt comes when the delta has been read and shards are being copied.
    script = f"""import os, signal, sys
from smt_trainer.cli import main
from smt_trainer.merging.plan import MergePlan
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
MergePlan.write = lambda *_: os.kill(os.getpid(), {int(signal.SIGINT)})
sys.exit(main())"""
    command = [sys.executable, "-c", script, "merge", str(base), str(delta[0]), str(tmp_path / "merged")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 130 and run.stderr.splitlines()[-1] == "smt: interrupted"
    assert "Traceback" not in run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}


def test_a_closed_pipe_ends_quietly(delta):
    process = subprocess.Popen([*SMT, "inspect", str(delta[0])], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_full_disk_under_the_output_gives_one_line_and_status_2(delta):
    command = [*SMT, "inspect", str(delta[0])]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (run.returncode, run.stderr) == (2, "smt: No space left on device\n")
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 2


def test_a_command_works_without_standard_output(base, delta, tmp_path):
    command = [*SMT, "merge", str(base), str(delta[0]), str(tmp_path / "merged")]
    run = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr and (tmp_path / "merged").is_dir()


def test_a_terminal_without_the_letters_of_a_name_gets_their_escapes(base, delta, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*SMT, "merge", str(base), str(delta[0]), str(tmp_path / "mé")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.endswith(r"m\xe9" + "\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "folder/file"), "smt: folder/file: Permission denied"),
        (OSError("folder could not be written: no space"), "smt: folder could not be written: no space"),
        (MemoryError("Unable to allocate 9 GiB"), "smt: not enough memory. Unable to allocate 9 GiB"),
    ],
)
def test_errors_of_the_system_are_one_line(error, said, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("smt_trainer.delta.delta.Delta.load", fail)
    assert said in refused(["inspect", "delta"], capsys)


# ---- what a file asks for ----


def test_a_regular_expression_from_a_file_is_not_run(llama, scores, tmp_path, capsys):
    # It would take 2 ** 30 steps on a name of 30 letters.
    slow = r"(\w*\.?)*(\w*\.?)*(\w*\.?)*!"
    found = BlockScores.load(scores)
    for fields in ({"target_modules": slow}, {"exclude_modules": slow}, {"target_modules": "("}):
        config = type(found.config)(**{**found.config.to_dict(), **fields})
        BlockScores(found.grids, found.scores, found.num_parameters, config).save(tmp_path / "slow.safetensors")
        assert main(["inspect", str(tmp_path / "slow.safetensors")]) == 0
        command = ["select", "--scores", str(tmp_path / "slow.safetensors"), "--output", str(tmp_path / "out")]
        assert main([*command, "--budget", "3", "--lowest-layer", "1"]) == 0
    chosen = json.loads((tmp_path / "out" / "smt_selection.json").read_text())["modules"]
    assert all("layers.1" in name for name in chosen)


def selection_of(edge: int, folder):
    """Write a selection of one block of 1x1 in a weight of edge x edge, in a model just as large."""
    config = tiny.config(block_size=1).to_dict()
    module = {"weight_shape": [edge, edge], "block_shape": [1, 1], "block_indices": [[edge - 1, edge - 1]]}
    values = {"format": 1, "base_model": None, "num_parameters": edge**2, "config": config, "modules": {"0.q": module}}
    (folder / "huge.json").write_text(json.dumps(values))
    return folder / "huge.json"


def test_a_small_file_asks_for_little_memory(tmp_path, capsys):
    path = str(selection_of(10**6, tmp_path))
    script = """import resource, sys
from smt_trainer.cli import main
resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
assert main(["inspect", sys.argv[1], sys.argv[1]]) == 0
assert main(["inspect", sys.argv[1]]) == 0"""
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[2].split() == ["all", "1", "1", "1", "1.000"]
    refused(["inspect", str(selection_of(10**8, tmp_path))], capsys)


def test_a_block_map_takes_as_much_memory_as_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    from smt_trainer import BlockSelection
    from smt_trainer.plotting.block_map import trained_share

    share = trained_share(BlockSelection.load(selection_of(10**6, tmp_path)), "0.q", 50, 40)
    assert share.shape == (50, 40) and (share > 0).sum() == 1


def test_the_whole_of_a_delta_is_named_by_inspect(tmp_path, capsys):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", train_norm=True)))
    save_delta(model, tmp_path / "delta")
    assert main(["inspect", str(tmp_path / "delta")]) == 0
    assert "model.norm.weight" in capsys.readouterr().out
    assert torch.equal(Delta.load(tmp_path / "delta").whole["model.norm.weight"], model.model.norm.weight)
