"""Run the commands and code of the README as written, and compare its figures with the committed results."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from statistics import mean

import pytest
import tiny
import torch

from recipes.studies import catalogue
from recipes.studies.parts.outcomes import Outcomes
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import Arm
from smt_trainer import SMTConfig
from smt_trainer.cli import main
from smt_trainer.settings import settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "recipes/benchmarks/results/README.md").read_text(encoding="utf-8")
STUDIES_RESULTS = ROOT / "recipes/studies/results"
STUDIES = " ".join((STUDIES_RESULTS / "README.md").read_text(encoding="utf-8").split())
STUDY = (ROOT / "recipes/selection_study/results/README.md").read_text(encoding="utf-8")
READMES = [
    Path("README.md"),
    Path("CONTRIBUTING.md"),
    *(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("README.md")),
]


def code(language: str) -> list[str]:
    """Return the README's code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def command_lines() -> list[list[str]]:
    """Return the commands of the README, without their comments."""
    lines = [line for block in code("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def own_loop(model) -> None:
    """Take one optimizer step."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    model(**tiny.batch()).loss.backward()
    optimizer.step()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_and_the_smt_commands_run_as_written(folder, base, capsys):
    names = {"base": str(base), "train_dataset": tiny.examples(), "collator": None}
    names |= {"batches": [tiny.batch()], "train": own_loop}
    for block in code("python"):
        exec(compile(block, "README.md", "exec"), names)
    commands = [words for words in command_lines() if words[0] == "smt"]
    verbs = {"compose", "estimate", "export", "extract", "inspect", "merge", "select", "verify"}
    assert {words[1] for words in commands} == verbs
    for words in commands:
        assert main([str(base) if word == "BASE" else word for word in words[1:]]) == 0
    assert (folder / "merged" / "model.safetensors").read_bytes()
    assert "blocks" in capsys.readouterr().out


@pytest.mark.parametrize("words", [words for words in command_lines() if words[0] == "make"], ids=" ".join)
def test_the_make_commands_exist(words):
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("path", READMES, ids=str)
def test_every_make_verb_named_in_a_text_exists(path):
    verbs = set(re.findall(r"`make ([a-z-]+)", (ROOT / path).read_text(encoding="utf-8")))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert verbs <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("folder", ["smt_trainer", "recipes"])
def test_the_file_tree_names_every_file_and_nothing_else(folder):
    tree = next(block for block in code("text") if block.startswith("smt_trainer/\n"))
    lines = re.search(rf"^{folder}/\n((?:  .+\n)+)", tree, flags=re.MULTILINE)[1].splitlines()
    files = {path for path in (ROOT / folder).iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert {line.split()[0] for line in lines} == {path.name + "/" * path.is_dir() for path in files}


def test_the_table_of_fields_says_what_the_fields_say():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, default, text in rows:
        field = settings(SMTConfig)[name]
        assert (default, text) == (repr(field.default), re.split(r"\.(?: |$)|: ", field)[0])


def test_the_readme_is_short():
    assert len(README.split()) <= 900


@pytest.mark.parametrize("path", READMES, ids=str)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / path).parent.joinpath(link).exists()] == []


def test_the_gain_in_the_readme_is_that_of_the_committed_run():
    report = (ROOT / "recipes/commonsense/results/results.md").read_text(encoding="utf-8")
    generated, likelihood = re.search(r"Gain: (\S+) .+?, (\S+) ", report).groups()
    assert f"{generated} points for generated\nanswers, {likelihood} by likelihood" in README


def test_the_loss_in_the_readme_is_that_of_the_committed_run():
    report = (ROOT / "recipes/math/results/results.md").read_text(encoding="utf-8")
    row = next(line for line in report.splitlines() if line.startswith("| **average**"))
    untuned, tuned, lora = re.findall(r"\*\*(\d\.\d{3})\*\*", row)
    assert f"lowers the loss on unseen problems from {untuned}\nto {tuned} nats a token, LoRA to {lora}." in README


def test_the_figures_of_a_step_are_those_of_the_committed_measurement():
    report = (ROOT / "recipes/benchmarks/results/step-smollm2-135m-fp32.md").read_text(encoding="utf-8")
    own = report.partition("## What SMT adds to the floor")[2].splitlines()[6:8]
    assert [line.split(" | ")[0] for line in own] == ["| 0.84 %", "| 5 %"]
    first, second = (f"{float(line.rstrip(' |').rpartition(' | ')[2]):.1f} %" for line in own)
    assert f"{first} of a step at 0.84 % of the\nparameters, {second} at 5 %" in BENCHMARKS


def ratio(report: str, method: str, budget: str, column: int) -> str:
    """Return a figure of a method in the first table of a benchmark's report."""
    lines = (ROOT / f"recipes/benchmarks/results/{report}.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {method} | {budget} |"))
    return row.strip("| ").split(" | ")[column]


def test_the_figures_on_a_gpu_are_those_of_the_committed_measurement():
    smt, lora, dora, shira = (
        [ratio("step-wide-bf16", method, budget, 2) for budget in ("0.84 %", "5 %")]
        for method in ("SMT blocks", "LoRA", "DoRA", "SHiRA")
    )
    assert f"takes {smt[0]} times the frozen model's\ntime; LoRA {lora[0]}, DoRA {dora[0]}" in README
    assert f"a step took {smt[0]} of the floor's time at\n  0.84 % and {smt[1]} at 5 %" in BENCHMARKS
    assert (
        f"LoRA took {lora[0]} and {lora[1]}, DoRA {dora[0]} and {dora[1]}, SHiRA {shira[0]} and {shira[1]}"
        in BENCHMARKS
    )


def test_the_peak_in_4_bits_is_that_of_the_committed_estimate():
    report = (ROOT / "recipes/benchmarks/results/estimator.md").read_text(encoding="utf-8")
    row = next(line for line in report.splitlines() if line.startswith("| 4 |"))
    assert f"checkpointed) peaks at {float(row.split(' | ')[3]):.1f} GiB" in README


def test_the_ratios_beside_the_benchmarks_are_those_of_their_reports():
    bf16, wide = "step-smollm2-135m-bf16", "step-wide-fp32"
    ours, theirs = (ratio(bf16, method, "0.84 %", 2) for method in ("SMT blocks", "LoRA"))
    assert f"a step took {ours} of the floor's time at 0.84 %, and PEFT's LoRA {theirs}" in BENCHMARKS
    ours, theirs = (ratio(wide, method, "0.84 %", 2) for method in ("SMT blocks", "LoRA"))
    assert f"it was {ours} and {theirs}." in BENCHMARKS


def test_the_figures_of_the_methods_are_those_of_the_committed_runs():
    report = (STUDIES_RESULTS / "methods.md").read_text(encoding="utf-8")
    text = STUDIES
    row = next(line for line in report.splitlines() if line.startswith("| LoRA, 0.84 % | +"))
    _, _, numbers, templates, general, _ = (
        cell.strip(" |+-") for cell in row.removeprefix("| LoRA, 0.84 % |").split(" | ")
    )
    assert (
        f"lower by {numbers} nats" in text and f"difference {templates})" in text and f"higher by {general} (" in text
    )
    assert "LoRA learned more than SMT" in text and "LoRA forgot more" in text
    assert f"| -{numbers} |" in row and f"| +{general} |" in row
    row = next(line for line in report.splitlines() if line.startswith("| random blocks, 0.84 % | +"))
    _, _, numbers, templates, general, _ = (
        cell.strip() for cell in row.removeprefix("| random blocks").split(" | ")[1:]
    )
    assert all(figure.startswith("-") and figure.removeprefix("-") in text for figure in (numbers, templates, general))


@pytest.mark.parametrize(
    ("study", "following"),
    [
        ("methods", "**[anatomy]"),
        ("anatomy", "**[depth]"),
        ("depth", "**[depth-all]"),
        ("depth-all", "**[warmup]"),
        ("warmup", "## A probe"),
    ],
)
def test_the_means_of_a_study_are_those_of_its_committed_runs(study, following):
    report = (STUDIES_RESULTS / f"{study}.md").read_text(encoding="utf-8")
    text = STUDIES.partition(f"**[{study}]")[2].partition(following)[0]
    means = re.findall(r"\d\.\d{3} ± \d\.\d{3}", text)
    assert len(means) > 3 and all(mean.lstrip("+-") in report for mean in means)


def runs(name: str) -> list[dict]:
    """Read a committed file of runs."""
    return [json.loads(line) for line in (STUDIES_RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_figures_of_full_fine_tuning_are_those_of_the_committed_runs():
    text, store = STUDIES, Store(STUDIES_RESULTS / "runs.jsonl")
    lora_all = Arm("LoRA, all linears", "lora-all", 0.0084)
    arms = [catalogue.UNTUNED, catalogue.FULL, catalogue.LOW_ALL, lora_all, catalogue.RANDOM_ALL]
    outcomes = Outcomes({arm: [store[run] for run in arm.reported("math", store) if run.seed < 4] for arm in arms})
    untuned, full, small, lora, random = (
        (mean(outcomes.means(arm, "loss", "new numbers")), mean(outcomes.means(arm, "forgetting", "general text")))
        for arm in arms
    )
    assert f"Full fine-tuning reached {full[0]:.3f}, forgot {full[1] - untuned[1]:.3f}." in README
    shares = [round(100 * (untuned[0] - reached) / (untuned[0] - full[0])) for reached, _ in (small, lora)]
    assert f"reach {small[0]:.3f} ({small[1]:.3f}): {shares[0]} % of what" in text
    assert f"LoRA on all linears {shares[1]} % ({lora[0]:.3f})" in text
    assert f"(random blocks with the same seeds {random[0]:.3f})" in text and f"({random[1]:.3f})." in text


def test_the_figures_of_another_processor_are_those_of_the_committed_runs():
    # A run that was repeated on more questions counts as it was first.
    first, again = ({str(one["run"]): one["means"] for one in reversed(runs(name))} for name in ("runs", "again"))
    text = STUDIES

    def pair(run: str, measure: str, name: str) -> str:
        return " for ".join(f"{means[run][measure][name]:.3f}" for means in (again, first))

    test, tuning = again
    assert f"new numbers was {pair(test, 'loss', 'new numbers')} (small inputs, seed 1; new templates " in text
    assert f"templates {pair(test, 'loss', 'new templates')}, general text " in text
    assert f"text {pair(test, 'forgetting', 'general text')}) and {pair(tuning, 'loss', 'new numbers')} (SMT" in text


def test_the_figures_of_where_blocks_lie_are_those_of_the_committed_runs():
    report = (STUDIES_RESULTS / "inputs.md").read_text(encoding="utf-8")
    text = STUDIES.partition("**[inputs]")[2].partition("**[methods]")[0]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines()]
    learned = {cells[0]: cells[6] for cells in rows if len(cells) == 10}
    forgot = {cells[0]: cells[8][:5] for cells in rows if len(cells) == 10}
    tuned = {
        cells[0]: min(re.findall(r": (\d\.\d+)", cells[2])) for cells in rows if len(cells) == 3 and ":" in cells[2]
    }
    small, lora, random = (f"{method}, all linears" for method in ("small inputs", "LoRA", "random"))
    paper, untuned = "the paper's, q/k/v", float(forgot["untuned"])
    names = {
        "| SMT, the paper's choice": paper,
        "| LoRA, all linears": lora,
        "| SMT, random blocks of all linears": random,
        '`target_modules="all-linear"`**': small,
    }
    for start, arm in names.items():
        row = next(line for line in README.splitlines() if f"{start} |" in line)
        assert row.endswith(f"| {learned[arm]} | {float(forgot[arm]) - untuned:.3f} |")
    assert f"reach {learned[small]} on new numbers, random blocks of all linears {learned[random]}, " in text
    assert f"the paper's choice {learned[paper]}, LoRA on q, k and v {learned['LoRA, q/k/v']}, " in text
    assert f"on all linears {learned[lora]}." in text
    assert f"SMT {tuned[small]}, LoRA on all linears {tuned[lora]}." in text
    against = {cells[0]: (cells[3], cells[5]) for cells in rows if len(cells) == 7}
    numbers, general = against[lora]
    assert f"higher by {numbers[1:]} on new numbers and by {general[1:]} on general text" in text
    rises = f"rises to {forgot[small]}, with LoRA to {forgot['LoRA, q/k/v']} (q, k, v) and {forgot[lora]}"
    assert f"general text, which {rises} (all linears)" in text
    numbers, general = against[random]
    assert f"(general text {forgot[random]}; difference {general[1:]}), and learn no less ({numbers[1:]})" in text


def test_the_figures_of_the_study_are_those_of_the_committed_run():
    report = (ROOT / "recipes/selection_study/results/study.md").read_text(encoding="utf-8")
    assert "q_proj 6, k_proj 7, v_proj 263" in report and "k_proj 33, v_proj 188" in report
    assert "263 of 276 blocks (95 %)" in STUDY and "puts 188 (68 %)" in STUDY
    assert "| `grad_l1` | 10 | 0.964 | 0.998 | 0.957 |" in report and "| `grad_signed` | 10 | 0.856 |" in report
    assert "0.96 for `grad_l1` and 0.86 for `grad_signed`" in STUDY
