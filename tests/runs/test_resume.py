"""Resuming from a checkpoint."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import training_script

from smt_trainer import SMTError, convert_to_smt, load_delta
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.training.trainer import SCORES_FILE, SELECTION_FILE, last_checkpoint


def test_a_fresh_process_ends_where_the_uninterrupted_run_ended(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, training_script.__file__, "resume", tmp_path, tmp_path / "run" / "checkpoint-2"],
        check=True,
        env=environment,
    )
    tiny.assert_same(torch.load(tmp_path / "result-0.pt", weights_only=True), expected)


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_runs_no_warm_up_and_ends_where_the_uninterrupted_run_ended(step, uninterrupted, tmp_path):
    folder, expected = uninterrupted
    callback = tiny.Noting()
    trainer = training_script.resumable(tmp_path, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert callback.events == ["train"]
    tiny.assert_same(training_script.result(trainer), expected)


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_without_the_state_of_an_optimizer_is_resumed_with_a_warning(only_model, tmp_path, caplog):
    training_script.resumable(tmp_path, save_only_model=only_model).train()
    training_script.resumable(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    said = [record for record in caplog.records if "no optimizer state" in record.getMessage()]
    assert len(said) == only_model


def test_the_last_checkpoint_is_found(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = training_script.resumable(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    tiny.assert_same(training_script.result(trainer), expected)


def test_a_folder_that_is_only_named_like_a_checkpoint_is_ignored(uninterrupted, tmp_path):
    for name in ("checkpoint-2", "checkpoint-4-kept"):
        shutil.copytree(uninterrupted[0] / "checkpoint-2", tmp_path / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_without_a_checkpoint_trainer_raises_its_own_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        training_script.resumable(tmp_path).train(resume_from_checkpoint=True)


@pytest.fixture
def interrupted(tmp_path):
    """Interrupt a run in its first step, after it has saved only its blocks and scores; return its folder."""

    class Breaking(tiny.RecordingSMTTrainer):
        def training_step(self, *args, **kwargs):
            if is_smt_model(self.model):
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        training_script.resumable(tmp_path, kind=Breaking).train()
    assert {path.name for path in tmp_path.iterdir()} == {SELECTION_FILE, SCORES_FILE}
    return tmp_path


def test_a_run_interrupted_before_its_first_checkpoint_restarts_with_its_blocks(interrupted, uninterrupted):
    trainer = training_script.resumable(interrupted)
    trainer.train(resume_from_checkpoint=True)
    outcome, expected = training_script.result(trainer), uninterrupted[1]
    assert outcome.pop("warm-ups") == [] and expected["warm-ups"] == [2]
    tiny.assert_same(outcome, {key: value for key, value in expected.items() if key != "warm-ups"})


def test_an_interrupted_run_does_not_restart_under_another_configuration(interrupted):
    trainer = training_script.resumable(interrupted, smt_config=tiny.config(budget=11))
    with pytest.raises(SMTError, match=f"{SELECTION_FILE} was made under another smt_config .*budget: 11 != 12"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_that_is_not_resumed_chooses_its_blocks_again(interrupted):
    trainer = training_script.resumable(interrupted)
    trainer.train()
    assert training_script.result(trainer)["warm-ups"] == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 11}, "budget: 11 != 12"),
        (
            {"score": "grad_signed", "smt_warmup_steps": 3},
            "score: 'grad_signed' != 'grad_l1'; smt_warmup_steps: 3 != 2",
        ),
        ({"block_size": 32, "budget": 3}, "block_size: 32 != 16"),
        ({"master_dtype": "float64"}, "master_dtype: 'float64' != 'float32'"),
    ],
)
def test_another_configuration_is_refused_naming_the_fields(fields, message, uninterrupted, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(attention_dropout=0.3), tmp_path, tiny.config(**fields))
    with pytest.raises(SMTError, match=f"made under another smt_config .*{message}"):
        trainer.train(resume_from_checkpoint=str(uninterrupted[0] / "checkpoint-2"))
    assert not is_smt_model(trainer.model)


def test_another_accumulator_device_is_accepted(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    trainer = training_script.resumable(tmp_path, smt_config=tiny.config(accumulator_device="cpu"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    tiny.assert_same(training_script.result(trainer), expected)


def test_a_checkpoint_of_another_base_is_refused(uninterrupted, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(seed=1), tmp_path)
    with pytest.raises(SMTError, match="other values in"):
        trainer.train(resume_from_checkpoint=str(uninterrupted[0] / "checkpoint-2"))


def test_a_delta_that_is_no_checkpoint_is_refused_and_trained_further_as_said(uninterrupted, tmp_path):
    delta = tmp_path / "delta"
    shutil.copytree(uninterrupted[0] / "checkpoint-2", delta)
    (delta / "trainer_state.json").unlink()
    model = tiny.llama()
    trainer = tiny.smt_trainer(model, tmp_path / "refused")
    with pytest.raises(SMTError, match=r"no trainer_state.json to resume from\. .* call load_delta"):
        trainer.train(resume_from_checkpoint=str(delta))
    assert not is_smt_model(model)
    trainer = tiny.smt_trainer(load_delta(model, delta), tmp_path / "further")
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps


def test_a_checkpoint_of_the_stock_trainer_is_refused(tmp_path):
    tiny.stock_trainer(tiny.llama(), tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(SMTError, match="no delta at"):
        tiny.smt_trainer(tiny.llama(), tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_blocks_is_refused(uninterrupted, tmp_path):
    model = tiny.llama(attention_dropout=0.3)
    convert_to_smt(model, replace(tiny.choose(model), config=tiny.config()))
    with pytest.raises(SMTError, match="holds other blocks"):
        tiny.smt_trainer(model, tmp_path).train(resume_from_checkpoint=str(uninterrupted[0] / "checkpoint-2"))


def test_a_run_on_a_given_selection_is_resumed_with_it(tmp_path):
    def make(folder: Path):
        model = tiny.llama(attention_dropout=0.3)
        selection = tiny.choose(model)
        smt_config = tiny.config(selection=selection, master_dtype="float64")
        return tiny.smt_trainer(model, folder, smt_config, save_strategy="steps", save_steps=2)

    first, again = make(tmp_path / "first"), make(tmp_path / "again")
    first.train()
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    ours, expected = (training_script.result(trainer) for trainer in (again, first))
    tiny.assert_same(ours, expected)


def test_a_run_whose_log_holds_nan_is_resumed(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    # As of a step whose gradients overflowed in float16.
    state["log_history"][0]["grad_norm"] = math.nan
    path.write_text(json.dumps(state))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
