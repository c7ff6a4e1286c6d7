"""A run that is killed (SIGKILL) and started again ends bit for bit where an uninterrupted one ends."""

import os
import signal
import subprocess
import sys

import pytest
import training_script
from test_resume import assert_same

from smt_trainer.trainer import SELECTION_FILE

MOMENTS = ["before the first step", "writing the delta", "writing the state of the trainer"]
MOMENTS += [
    pytest.param(moment, marks=pytest.mark.slow)
    for moment in ("in the warm-up", "writing the selection", "writing the optimizer", "in the main loop")
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(moment, uninterrupted, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, training_script.__file__, "killed", tmp_path, moment], env=environment)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    trainer = training_script.resumable(run)
    # Nothing to resume is an error of Trainer's own; a launcher looks first.
    trainer.train(resume_from_checkpoint=(run / SELECTION_FILE).is_file() or any(run.glob("checkpoint-*")))
    outcomes = (training_script.result(trainer), uninterrupted[1])
    # The warm-up is reported by the process that ran it.
    assert_same(*({key: value for key, value in outcome.items() if key != "warm-ups"} for outcome in outcomes))
