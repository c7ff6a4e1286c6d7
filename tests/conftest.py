"""Fixtures. `tiny.py` has models, data and training arguments; `reference.py` has slow twins."""

import gc
import logging

import hub as hubs
import pytest
import tiny
import torch
import training_script
from hypothesis import settings

torch.set_num_threads(1)
# The time for an example depends on the machine only.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def small_heap():
    """Exempt the imports from the garbage collection at the start of each training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Give each test the same random numbers, independent of earlier tests."""
    torch.manual_seed(0)


@pytest.fixture
def llama():
    """Make the tiny Llama of `tiny.llama`."""
    return tiny.llama()


@pytest.fixture
def warnings(caplog):
    """Return a function that gives the library's warnings so far."""
    caplog.set_level(logging.WARNING, logger="smt_trainer")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("smt_trainer")]


@pytest.fixture
def hub(tmp_path):
    """Serve an empty hub to this process; return it (see `support/hub.py`)."""
    with hubs.used(tmp_path / "hub-cache") as served:
        yield served


@pytest.fixture
def base(llama, tmp_path):
    """Write the tiny Llama to disk; return its folder."""
    llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def delta(tmp_path):
    """Save a delta of the tiny Llama with changed blocks; return its folder and the rewritten model."""
    from smt_trainer import convert_to_smt, save_delta
    from smt_trainer.sparse.block_module import block_modules
    from smt_trainer.sparse.write_back import write_back

    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model))
    linears = [linear for _, linear in block_modules(model)]
    with torch.no_grad():
        for linear in linears:
            linear.blocks += torch.randn_like(linear.blocks) / 8
    write_back(linears)
    save_delta(model, tmp_path / "delta")
    return tmp_path / "delta", model


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Run without interruption; return the folder with the checkpoints, and the outcome."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = training_script.resumable(folder)
    trainer.train()
    return folder, training_script.result(trainer)
