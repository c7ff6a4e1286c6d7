"""`SMTCallback` and the write-back: events and logs; training does not depend on the callback."""

import re

import pytest
import tiny
import torch
from transformers import TrainerCallback

from smt_trainer import SMTCallback
from smt_trainer.sparse.block_module import block_modules


@pytest.mark.parametrize("given", [tiny.Noting, tiny.Noting()], ids=["class", "instance"])
def test_a_subclass_takes_the_place_of_the_callback_and_sees_the_events_in_order(given, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, callbacks=[given])
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, SMTCallback))
    trainer.train()
    assert isinstance(callback, tiny.Noting)
    assert callback.events == ["begin 2", "step 0", "step 1", "end", "selection of 12", "train"]


def test_a_failed_warm_up_reports_its_end(tmp_path):
    class Failing(tiny.SMTTrainer):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("broken")

    callback = tiny.Noting()
    with pytest.raises(RuntimeError, match="broken"):
        tiny.smt_trainer(tiny.llama(), tmp_path, kind=Failing, callbacks=[callback]).train()
    assert callback.events == ["begin 2", "end"]


def test_the_warm_up_is_reported_once_beside_the_first_loss(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, learning_rate=0.0)
    trainer.train()
    first, *rest = trainer.state.log_history
    assert first["step"] == 1 and first["smt_warmup_steps"] == 2 and first["smt_blocks"] == 12
    assert first["loss"] == pytest.approx(trainer.losses[0], rel=1e-6)
    assert first["smt_fraction_of_model"] == trainer.smt_selection.fraction_of_model
    assert first["smt_warmup_runtime"] > 0
    assert first["smt_warmup_loss"] == pytest.approx(sum(trainer.losses[:2]) / 2, rel=1e-6)
    assert not any("smt_blocks" in entry for entry in rest)


def test_a_run_that_logs_no_loss_reports_the_warm_up_at_its_end(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, logging_strategy="no")
    trainer.train()
    (only,) = trainer.state.log_history
    assert only["smt_warmup_steps"] == 2 and "train_loss" in only


def test_without_progress_bars_the_log_tells_of_the_warm_up(tmp_path, caplog):
    caplog.set_level("INFO", logger="smt_trainer")
    tiny.smt_trainer(tiny.llama(), tmp_path).train()
    lines = [record.getMessage() for record in caplog.records if "gradient warm-up" in record.getMessage()]
    assert lines[0] == "The gradient warm-up begins: 2 steps." and re.fullmatch(r".* ended after \d+\.\d s\.", lines[1])


class Silent(SMTCallback):
    """Never calls `super()`."""

    def __init__(self):
        pass

    def on_warmup_begin(self, args, num_steps):
        pass

    def on_warmup_step(self, args, step, loss):
        pass

    def on_warmup_end(self, args):
        pass

    def on_selection(self, args, selection):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def on_optimizer_step(self, args, state, control, **kwargs):
        pass


@pytest.mark.parametrize("callback", ["silent", "removed"])
def test_training_does_not_depend_on_the_callback(callback, tmp_path):
    usual, other = (
        tiny.smt_trainer(tiny.llama(), tmp_path, callbacks=callbacks)
        for callbacks in (None, [Silent()] if callback == "silent" else None)
    )
    if callback == "removed":
        other.remove_callback(SMTCallback)
    for trainer in (usual, other):
        trainer.train()
    assert usual.losses == other.losses and usual.losses[-1] < usual.losses[0]
    tiny.assert_same(tiny.weights(other.model), tiny.weights(usual.model))


def test_forward_reads_the_updated_blocks_after_each_step(tmp_path):
    class Checking(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.steps += 1
            for _, linear in block_modules(model):
                held = linear.grid.gather(linear.weight, linear.block_indices)
                assert torch.equal(held, linear.blocks.detach())

    callback = Checking()
    tiny.smt_trainer(tiny.llama(), tmp_path, callbacks=[callback], gradient_accumulation_steps=2).train()
    assert callback.steps == 4
