"""Experts from the warm-up to the last step: resumed, and on two ranks."""

import pytest
import tiny
import torch
import training_script
from mixtures import mixture
from ranks import assert_two_ranks_train_like_one_process

from smt_trainer import SMTError, from_delta, merge_checkpoint

CONFIG = {"target_modules": "mlp", "budget": {"experts": 24}, "block_size": 16}


def test_a_run_ends_in_a_delta_that_merges(tmp_path):
    mixture().save_pretrained(tmp_path / "base")
    model = type(mixture()).from_pretrained(tmp_path / "base")
    trainer = tiny.smt_trainer(model, tmp_path / "run", tiny.config(**CONFIG, train_bias=False))
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "saved")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    expected = tiny.logits(model)
    assert not torch.equal(expected, tiny.logits(mixture().train()))
    assert torch.equal(tiny.logits(from_delta(tmp_path / "delta", base=str(tmp_path / "base"))), expected)
    for folder in ("saved", "merged"):
        assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path / folder)), expected)


def test_resuming_ends_where_the_uninterrupted_run_ended(tmp_path):
    whole = training_script.resumable(tmp_path, mixture, smt_config=tiny.config(**CONFIG))
    whole.train()
    resumed = training_script.resumable(tmp_path / "resumed", mixture, smt_config=tiny.config(**CONFIG))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_same(training_script.result(resumed), training_script.result(whole))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_like_one_process(tmp_path):
    assert_two_ranks_train_like_one_process(tmp_path, make=mixture, smt_config=tiny.config(**CONFIG), learning_rate=0.1)


def test_classes_of_tokens_are_refused(tmp_path):
    trainer = tiny.smt_trainer(mixture(), tmp_path, tiny.config(**CONFIG, score="qm_taylor"))
    with pytest.raises(SMTError, match="the router sends single tokens to"):
        trainer.train()


def test_compiling_is_refused(tmp_path):
    with pytest.raises(SMTError, match="which torch_compile=True prevents"):
        tiny.smt_trainer(mixture(), tmp_path, tiny.config(**CONFIG), torch_compile=True)
    tiny.smt_trainer(mixture(), tmp_path, tiny.config(), torch_compile=True)
