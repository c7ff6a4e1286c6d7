"""A run that is killed (SIGKILL) and restarted ends bit-identical to an uninterrupted one."""

import itertools
import random
import shutil
import signal

import pytest
import tiny
import torch
import training_script
from training_script import Evaluated, duration, launch, outcomes, torchrun

from smt_trainer.training.trainer import SELECTION_FILE, last_checkpoint

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
MOMENTS = ["in the warm-up", "before the first step", "writing the delta", "in the main loop"]
# A run of three epochs, long enough to be killed in each of its phases.
LONG = {"max_steps": 12, "save_steps": 1, "save_total_limit": 2, "smt_config": tiny.config(smt_warmup_steps=6)}


def without_warm_up(outcomes: list[dict]) -> list[dict]:
    """Drop the reports of warm-ups: only the process that ran the warm-up has one."""
    return [{key: value for key, value in outcome.items() if key != "warm-ups"} for outcome in outcomes]


def assert_ends_as(folder, expected: list[dict], **overrides) -> None:
    """Restart a run and check that it ends as expected."""
    assert launch(folder, len(expected), **overrides) == [0] * len(expected)
    tiny.assert_same(*map(without_warm_up, (outcomes(folder, len(expected)), expected)))


def die(folder, processes: int = 1, **how) -> None:
    codes = launch(folder, processes, **how)
    # A rank whose peer is dead may notice before the launcher does.
    assert -signal.SIGKILL in codes and 0 not in codes


@pytest.mark.parametrize(
    "moment", [*MOMENTS, "writing the selection", "writing the optimizer", "writing the state of the trainer"]
)
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(moment, uninterrupted, tmp_path):
    die(tmp_path, moment=moment)
    assert_ends_as(tmp_path, [uninterrupted[1]])


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Run on two ranks without interruption; return the folder and the outcome of each rank."""
    folder = tmp_path_factory.mktemp("two-ranks")
    assert launch(folder, 2) == [0, 0]
    return folder, outcomes(folder, 2)


@needs_gloo
@pytest.mark.parametrize(
    ("moment", "dying"),
    [
        pytest.param(
            moment,
            dying,
            marks=[] if (moment, dying) == ("in the main loop", [1]) else pytest.mark.slow,
            id=f"{moment}, {' and '.join(map(str, dying))}",
        )
        for moment in MOMENTS
        for dying in ([0], [1], [0, 1])
        # Only the first rank writes the delta.
        if moment != "writing the delta" or dying == [0]
    ],
)
def test_a_run_killed_on_two_ranks_ends_where_an_uninterrupted_one_ends(moment, dying, on_two_ranks, tmp_path):
    die(tmp_path, 2, moment=moment, dying=dying)
    assert_ends_as(tmp_path, on_two_ranks[1])


@needs_gloo
@pytest.mark.slow
def test_two_ranks_in_new_interpreters_end_where_the_uninterrupted_run_ended(on_two_ranks, tmp_path):
    folder, expected = on_two_ranks
    shutil.copytree(folder / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    torchrun(training_script.__file__, 2, "resume", tmp_path, checkpoint, ACCELERATE_USE_CPU="true")
    tiny.assert_same(outcomes(tmp_path, 2), expected)


@needs_gloo
@pytest.mark.slow
def test_a_checkpoint_without_the_random_state_of_every_rank_is_ignored(on_two_ranks, tmp_path):
    die(tmp_path, 2, moment="before the random state", dying=[1])
    assert_ends_as(tmp_path, on_two_ranks[1])


def test_a_checkpoint_whose_rewriting_was_interrupted_is_ignored(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    for step in (2, 4):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    die(tmp_path, moment="writing the optimizer", checkpoint=2)
    assert_ends_as(tmp_path, [expected])


def test_the_only_kept_checkpoint_survives_half_written_ones(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-2", run / "checkpoint-2")
    for moment in ("writing the delta", "writing the optimizer"):
        die(tmp_path, moment=moment, save_total_limit=1)
        assert last_checkpoint(run) == str(run / "checkpoint-2")
    die(tmp_path, moment="deleting a checkpoint", save_total_limit=1)
    assert last_checkpoint(run) == str(run / "checkpoint-4")
    assert_ends_as(tmp_path, [expected], save_total_limit=1)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_best_checkpoint_survives_a_half_written_one(tmp_path):
    # The first checkpoint is the best, since the loss falls and greater is better.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    best |= {"kind": Evaluated, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    assert launch(uninterrupted, **best) == [0]
    for moment in ("in the main loop", "writing the optimizer"):
        die(killed, moment=moment, **best)
    assert_ends_as(killed, outcomes(uninterrupted), **best)
    left = [[path.name for path in folder.glob("run/checkpoint-*")] for folder in (killed, uninterrupted)]
    assert left == [["checkpoint-2"]] * 2


def phase(run) -> str:
    """Infer from the folder of a killed run where it was killed."""
    if not (run / SELECTION_FILE).is_file():
        return "warm-up"
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    if not steps:
        return "before the first checkpoint"
    if last_checkpoint(run) != str(run / f"checkpoint-{steps[-1]}"):
        return "writing a checkpoint"
    return "at the end" if steps[-1] == LONG["max_steps"] else "main loop"


@pytest.fixture(scope="module")
def long_run(request, tmp_path_factory):
    """Make a longer run on the given number of ranks; return the outcomes and the seconds it took."""
    folder = tmp_path_factory.mktemp("long-run")
    assert launch(folder, request.param, **LONG) == [0] * request.param
    return outcomes(folder, request.param), duration(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("long_run", "seed"),
    [(1, seed) for seed in range(20)] + [pytest.param(2, seed, marks=needs_gloo) for seed in range(10)],
    indirect=["long_run"],
)
def test_a_run_killed_again_and_again_at_any_time_ends_where_an_uninterrupted_one_ends(
    long_run, seed, tmp_path, record_property
):
    expected, seconds = long_run
    generator, processes = random.Random(seed), len(expected)
    times = sorted(generator.uniform(0, seconds) for _ in range(generator.randint(1, 3)))
    for last, now in itertools.pairwise([0.0, *times]):
        dying = generator.sample(range(processes), generator.randint(1, processes))
        die(tmp_path, processes, delay=now - last, dying=dying, **LONG)
        record_property("killed", phase(tmp_path / "run"))
    assert_ends_as(tmp_path, expected, **LONG)
