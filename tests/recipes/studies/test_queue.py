import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recipes import queue
from recipes.studies.parts.report import markdown, write_report
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import Arm, Study

sys.path.insert(0, str(Path(__file__).parent))
import fakes

SMT = Arm("SMT", "smt", 0.0084)
STUDY = Study(
    "small",
    "Does it work?",
    (SMT, Arm("untuned", "none"), Arm("LoRA", "lora", 0.0084), Arm("as SMT", "random", 0.0084, rate_of=SMT)),
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Work on the study with a fake `perform`; return the store as a later process reads it."""

    def work(perform, deadline=None, pool=lambda queue: ThreadPoolExecutor(queue.processes)):
        monkeypatch.setattr(queue, "perform", perform)
        monkeypatch.setattr(queue.Queue, "_pool", pool)
        made = queue.Queue(Store(tmp_path / "runs.jsonl"), processes=2, threads=1)
        made.work([STUDY], deadline)
        return Store(tmp_path / "runs.jsonl"), made

    return work


def test_everything_that_a_study_needs_is_made_once(work):
    store, _ = work(fakes.perform)
    # Four rates for each of two arms, three seeds for each of three, and the untuned model.
    assert len(store) == 2 * 4 + 3 * 3 + 1
    assert not list(STUDY.missing(store))
    lines = store.path.read_text().splitlines()
    work(fakes.perform_badly)
    assert store.path.read_text().splitlines() == lines


@pytest.mark.slow
def test_a_killed_run_is_begun_again(work, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent), prepend=os.pathsep)
    store, made = work(fakes.perform_once_killed, pool=queue.Queue._pool)
    assert not list(STUDY.missing(store))
    assert not made.failed


@pytest.mark.slow
def test_the_workers_of_a_killed_queue_end(tmp_path):
    workers = tmp_path / "workers"
    workers.mkdir()
    code = "import fakes; from recipes import queue; queue.perform = fakes.perform_for_ever; queue.main()"
    paths = os.pathsep.join([str(Path(fakes.__file__).parent), *sys.path])
    environment = {**os.environ, "WORKERS": str(workers), "PYTHONPATH": paths}
    made = subprocess.Popen(
        [sys.executable, "-c", code, "methods", "--processes", "2", "--results", str(tmp_path / "runs.jsonl")],
        env=environment,
    )
    while len(list(workers.iterdir())) < 2:
        assert made.poll() is None
        time.sleep(0.1)
    made.kill()
    made.wait()
    for worker in workers.iterdir():
        wait_for_the_end_of(int(worker.name))


def wait_for_the_end_of(process: int, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < end, f"process {process} goes on"
        time.sleep(0.1)


def test_what_fails_twice_is_given_up_and_the_rest_is_made(work):
    store, made = work(fakes.perform_badly)
    assert {run.method for run in made.failed} == {"lora"}
    assert {run.method for run in STUDY.missing(store)} == {"lora"}


def test_nothing_is_begun_after_the_deadline(work):
    store, _ = work(fakes.perform, deadline=0.0)
    assert len(store) == 0


def test_the_report_names_the_tuned_rate_and_compares_with_the_first_arm(work, tmp_path):
    store, _ = work(fakes.perform)
    write_report(STUDY, store, tmp_path)
    text = (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.png").stat().st_size > 0
    assert "| SMT | 10 | 0.001 | 3 |" in text
    assert "| LoRA | 0.001 | 0.0001: " in text
    assert "Against SMT" in text
    assert "| LoRA | +0.000 ± 0.000 |" in text
    assert "Not finished" not in text


def test_the_report_of_an_unfinished_study_says_what_is_missing(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    assert "Not finished" in markdown(STUDY, {arm: [] for arm in STUDY.arms}, store)


def test_arms_are_compared_on_the_seeds_that_both_have(tmp_path):
    def result(seed):
        values = {"loss": {"new numbers": [float(seed), seed + 1.0]}}
        run = {"run": {"seed": seed, "rate": 0.001}, "values": values}
        return run | {"means": {"loss": {"new numbers": seed + 0.5}}, "seconds": 1, "hardware": "", "versions": {}}

    other = Arm("other", "lora", 0.0084)
    results = {SMT: [result(1), result(2), result(3)], other: [result(2), result(3), result(4)]}
    assert "| other | +0.000 ± 0.000 |" in markdown(STUDY, results, Store(tmp_path / "runs.jsonl"))


def test_what_a_wider_test_would_measure_again_comes_last(work):
    store, _ = work(fakes.perform)
    narrow = store[SMT.final("math", fakes.BEST_RATE)[0]]
    assert not list(STUDY.narrow(store))
    for result in [store[run] for arm in STUDY.arms for run in arm.reported("math", store)]:
        templates = [7] if result is narrow else [7, 8]
        store.add(result | {"templates": {"new numbers": templates}})
    assert [run.seed for run in STUDY.narrow(store)] == [1]
    assert [run.method for run in queue.missing([STUDY], store)] == ["smt"]
    again, _ = work(fakes.perform_widely)
    assert not list(STUDY.narrow(again)) and not queue.missing([STUDY], again)
