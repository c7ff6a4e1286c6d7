"""What the README says can be done is done here, in its words."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny

from smt_trainer.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(language: str) -> list[str]:
    """The README's code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def command_lines() -> list[list[str]]:
    """The commands of the README, without their comments."""
    lines = [line for block in code("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_and_the_smt_commands_run_as_written(folder, base, capsys):
    names = {"base": str(base), "train_dataset": tiny.examples(), "collator": None}
    for block in code("python"):
        exec(compile(block, "README.md", "exec"), names)
    commands = [words for words in command_lines() if words[0] == "smt"]
    assert {words[1] for words in commands} == {"inspect", "merge", "estimate", "select"}
    for words in commands:
        assert main([str(base) if word == "BASE" else word for word in words[1:]]) == 0
    assert (folder / "merged" / "model.safetensors").read_bytes()
    assert "blocks" in capsys.readouterr().out


@pytest.mark.parametrize("words", [words for words in command_lines() if words[0] == "make"], ids=" ".join)
def test_the_make_commands_exist(words):
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_every_make_verb_named_in_the_text_exists():
    verbs = set(re.findall(r"`make ([a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert verbs <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("folder", ["smt_trainer", "recipes"])
def test_the_file_tree_names_every_file_and_nothing_else(folder):
    tree = next(block for block in code("text") if block.startswith("smt_trainer/\n"))
    lines = re.search(rf"^{folder}/\n((?:  .+\n)+)", tree, flags=re.MULTILINE)[1].splitlines()
    files = {path for path in (ROOT / folder).iterdir() if not path.name.startswith("__")}
    assert {line.split()[0] for line in lines} == {path.name + "/" * path.is_dir() for path in files}


def test_every_default_in_the_table_of_fields_is_the_real_one():
    from smt_trainer import SMTConfig

    rows = re.findall(r'^\| `(\w+)` \| `"?([^"`]+)"?` \|', README, flags=re.MULTILINE)
    assert len(rows) >= 6
    assert {name: str(getattr(SMTConfig(), name)) for name, _ in rows} == dict(rows)


def test_the_result_is_that_of_the_committed_run():
    folder = ROOT / "recipes" / "commonsense" / "results"
    report = (folder / "results.md").read_text(encoding="utf-8")
    shown = [line for line in report.splitlines() if line.startswith(("| ", "|---|", "Gain"))]
    assert len(shown) > 20
    missing = [line for line in shown if line not in README]
    assert missing == []
    assert "recipes/commonsense/results/selection.png" in README and (folder / "selection.png").is_file()


def test_the_figures_of_a_step_are_those_of_the_committed_measurement():
    report = (ROOT / "recipes/benchmarks/results/step-smollm2-135m-fp32.md").read_text(encoding="utf-8")
    shown = [line for line in report.partition("## Time")[0].splitlines() if line.startswith("| ")]
    assert len(shown) > 20 and [line for line in shown if line not in README] == []
    own = report.partition("## What SMT adds to the floor")[2].splitlines()[6:8]
    assert [line.split(" | ")[0] for line in own] == ["| 0.84 %", "| 5 %"]
    first, second = (f"{float(line.rstrip(' |').rpartition(' | ')[2]):.1f} %" for line in own)
    assert f"{first} of a step at 0.84 % of the parameters, {second} at 5 %" in README


def test_the_figures_of_the_study_are_those_of_the_committed_run():
    report = (ROOT / "recipes/selection_study/results/study.md").read_text(encoding="utf-8")
    assert "q_proj 6, k_proj 7, v_proj 263" in report and "k_proj 33, v_proj 188" in report
    assert "| `grad_l1` | 10 | 0.964 | 0.998 | 0.957 |" in report and "| `grad_signed` | 10 | 0.856 |" in report
