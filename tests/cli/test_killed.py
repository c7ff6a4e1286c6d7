"""Runs of `smt` that are interrupted or killed while they write, and the next with the same output."""

import os
import signal
import subprocess
import sys

import pytest

from smt_trainer.cli import main

COMMANDS = {
    "merge": "merge @base @delta0 @out",
    "export": "export @base @delta0 @out --format lora",
    "extract": "extract @base @merged @out --block-size 16",
    "compose": "compose @base @delta0 @delta1 @out",
    "unmerge": "unmerge @base @delta0 @merged @out",
    "select": "select --scores @scores.safetensors --output @out",
}
# Runs `smt`, which signals itself when it first makes sure that a file is on the disk, or a folder is ready.
SIGNALLING = """import itertools, os, signal, sys
from smt_trainer import files
from smt_trainer.cli import main
number, *argv = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
calls = itertools.count()
os.fsync = files._set_modes = lambda *_: next(calls) or os.kill(os.getpid(), int(number))
sys.exit(main(argv))"""


def words(command, folder):
    return [str(folder / word[1:]) if word.startswith("@") else word for word in COMMANDS[command].split()]


def start(command, folder, number):
    arguments = [sys.executable, "-c", SIGNALLING, str(int(number)), *words(command, folder)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def unfinished(folder):
    return sorted(path.name for path in folder.rglob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_run_removes_what_a_killed_one_left_and_says_so(command, folder, warnings):
    assert start(command, folder, signal.SIGKILL).wait() == -signal.SIGKILL
    assert unfinished(folder) and not list((folder / "out").glob("[!.]*"))
    assert main(words(command, folder)) == 0
    assert not unfinished(folder) and any((folder / "out").iterdir())
    assert ["killed process left" in line for line in warnings()].count(True) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_run_leaves_nothing(command, folder):
    process = start(command, folder, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and said.splitlines()[-1] == "smt: interrupted" and "Traceback" not in said
    assert not unfinished(folder) and not list(folder.glob("out/*"))


@pytest.mark.parametrize(("command", "status"), [("merge", 2), ("select", 0)])
def test_what_a_living_run_writes_is_left_alone(command, status, folder, warnings, capsys):
    process = start(command, folder, signal.SIGSTOP)
    try:
        os.waitpid(process.pid, os.WUNTRACED)
        before = unfinished(folder)
        assert main(words(command, folder)) == status
        assert ("another process is writing" in capsys.readouterr().err) == (status == 2)
        assert unfinished(folder) == before and before and not warnings()
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert not unfinished(folder) and any((folder / "out").iterdir())
