"""Tests that need a GPU. On a machine with one, run `make test` or `pytest -m gpu`."""

import pytest
import sharded_script
import tiny
import torch
from training_script import torchrun

from smt_trainer import SMTTrainer
from smt_trainer.config import SCORES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(folder, smt_config=None, **overrides) -> SMTTrainer:
    return tiny.smt_trainer(tiny.llama(), folder, smt_config, use_cpu=False, max_steps=8, **overrides)


@pytest.mark.parametrize("score", SCORES[:-2])
def test_a_gpu_scores_like_a_cpu(score, tmp_path):
    smt_config = tiny.config(score=score)
    ours = tiny.warm_up(on_gpu(tmp_path, smt_config))
    torch.testing.assert_close(ours, tiny.warm_up(tiny.smt_trainer(tiny.llama(), tmp_path, smt_config)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_sums_are_kept_does_not_change_the_scores(dtype, tmp_path):
    kept = {
        place: tiny.warm_up(on_gpu(tmp_path, tiny.config(accumulator_device=place, accumulator_dtype=dtype)))
        for place in ("device", "cpu")
    }
    torch.testing.assert_close(kept["cpu"], kept["device"])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_training_follows_full_precision(precision, tmp_path):
    full, mixed = (on_gpu(tmp_path / name, **more) for name, more in (("full", {}), ("mixed", {precision: True})))
    for trainer in (full, mixed):
        trainer.train()
    assert tiny.logged(mixed, "loss") == pytest.approx(tiny.logged(full, "loss"), rel=0.02)
    assert tiny.logged(mixed, "loss")[-1] < tiny.logged(mixed, "loss")[0]


def test_the_warm_up_leaves_the_random_state_of_the_gpu_as_it_was(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(attention_dropout=0.3), tmp_path, use_cpu=False)
    state = torch.cuda.get_rng_state()
    tiny.warm_up(trainer)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_liger_kernels_give_the_same_losses(tmp_path):
    pytest.importorskip("liger_kernel")
    plain, liger = (on_gpu(tmp_path / name, use_liger_kernel=name == "liger") for name in ("plain", "liger"))
    for trainer in (plain, liger):
        trainer.train()
    assert tiny.logged(liger, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["fsdp", "fsdp-bf16", "zero2", "zero3"])
def test_two_gpus_end_with_the_same_values_and_resume(name, tmp_path):
    torchrun(sharded_script.__file__, 2, tmp_path, name)
    first, second = (torch.load(tmp_path / name / f"result-{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first["resumed"], first["trained"])
