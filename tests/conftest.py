"""Fixtures. Models, data and training arguments are in `tiny.py`, the slow twins in `reference.py`."""

import gc
import logging

import pytest
import tiny
import torch
import training_script
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes says something about the machine only.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def small_heap():
    """Each training run collects garbage first, which takes long among all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Each test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def llama():
    """The tiny Llama of `tiny.llama`."""
    return tiny.llama()


@pytest.fixture
def warnings(caplog):
    """Messages that the library logged as warnings."""
    caplog.set_level(logging.WARNING, logger="smt_trainer")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("smt_trainer")]


@pytest.fixture
def base(llama, tmp_path):
    """The tiny Llama on disk: its folder."""
    llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def delta(tmp_path):
    """A delta of the tiny Llama whose blocks were shifted: its folder, and the rewritten model it came from."""
    from smt_trainer import convert_to_smt, save_delta
    from smt_trainer.sparse.linear import smt_linears
    from smt_trainer.sparse.write_back import write_back

    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model))
    layers = [layer for _, layer in smt_linears(model)]
    with torch.no_grad():
        for layer in layers:
            layer.blocks += torch.randn_like(layer.blocks) / 8
    write_back(layers)
    save_delta(model, tmp_path / "delta")
    return tmp_path / "delta", model


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted run with its checkpoints, and its outcome."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = training_script.resumable(folder)
    trainer.train()
    return folder, training_script.result(trainer)
