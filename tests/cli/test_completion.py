"""`smt completion`: what a shell offers."""

import shutil
import subprocess

import pytest

from smt_trainer.cli import main

# Prints what bash would offer for the last of the words.
OFFERED = """source "$1"; shift
COMP_WORDS=(smt "$@") COMP_CWORD=$#
_smt && printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path, capsys):
    """Return a function that writes the script of a shell and returns its path."""

    def write(shell):
        assert main(["completion", shell]) == 0
        (tmp_path / f"script.{shell}").write_text(capsys.readouterr().out)
        return str(tmp_path / f"script.{shell}")

    return write


@pytest.fixture
def offered(script, tmp_path):
    """Return a function that gives what bash offers for a command line, in a folder with some files."""
    path = script("bash")
    for name in ("delta one", "dense"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
    for name in ("data.json", "delta one/smt_config.json"):
        (tmp_path / name).write_text("{}")

    def complete(*words):
        command = ["bash", "--norc", "-c", OFFERED, "bash", path, *words]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert run.stderr == ""
        return set(run.stdout.splitlines()) - {""}

    return complete


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["in"], {"inspect"}),
        (["un"], {"unmerge"}),
        (["--v"], {"--version"}),
        (["merge", "--o"], {"--onto"}),
        (["merge", "a", "b", "c", "--onto", ""], {"dequantized", "original"}),
        (["select", "--dtype", "b"], {"bfloat16"}),
        (["estimate", "--bits", ""], {"4", "8"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        # Folders, or files as well.
        (["merge", "d"], {"delta one", "dense"}),
        (["merge", "base", "delta one/"], {"delta one/checkpoint-5"}),
        (["inspect", "d"], {"delta one", "dense", "data.json"}),
        (["select", "--data", "da"], {"data.json"}),
        (["select", "--output", "d"], {"delta one", "dense"}),
        # Nothing is known.
        (["select", "--budget", "d"], set()),
        (["nothing", "d"], set()),
    ],
    ids=" ".join,
)
def test_bash_offers(words, expected, offered):
    assert offered(*words) == expected


def test_bash_offers_every_command_and_every_flag(offered, capsys):
    commands = {word for word in offered("") if not word.startswith("-")}
    assert {"select", "verify", "completion"} < commands
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        said = capsys.readouterr().out
        flags = {word.strip("[],.;") for word in said.partition("options:")[2].split() if word.startswith("--")}
        assert {"--help"} <= offered(command, "--") <= flags


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_read_its_script(shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    run = subprocess.run([shell, "--no-execute" if shell == "fish" else "-n", script(shell)], capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "powershell"])
    assert "choose from" in capsys.readouterr().err
