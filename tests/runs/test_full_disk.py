"""A disk that fills up half-way through a file: earlier files stay whole, and no partial file is left.

The fault is real: the kernel lets no file of this process grow beyond a limit.
"""

import contextlib
import resource
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import training_script
from transformers import AutoModelForCausalLM, TrainerState

import smt_trainer.delta.delta
from smt_trainer import BlockSelection, convert_to_smt, load_delta, save_delta
from smt_trainer.cli import main
from smt_trainer.delta.delta import DELTA_FILE
from smt_trainer.training.trainer import SCORES_FILE, SELECTION_FILE, last_checkpoint

# torch.save raises a RuntimeError.
FULL = pytest.raises((OSError, RuntimeError), match=r"File too large|unexpected pos")
ROOM = 10_000


@contextlib.contextmanager
def full_disk(room: int):
    """Let no file grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def fills_up(monkeypatch):
    """Return a function that makes another one find the disk full if an argument contains `name`."""

    def make(owner, function: str, name: str = ""):
        write = getattr(owner, function)

        def written(*args, **kwargs):
            with full_disk(100) if any(name in str(each) for each in args) else contextlib.nullcontext():
                return write(*args, **kwargs)

        monkeypatch.setattr(owner, function, written)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files and folders below a folder, hidden or not, with their bytes."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in paths.items()}


def test_an_older_selection_survives(uninterrupted, fills_up, monkeypatch, tmp_path):
    tiny.choose(tiny.llama()).save(tmp_path / SELECTION_FILE)
    before = contents(tmp_path)
    fills_up(BlockSelection, "save")
    with FULL:
        training_script.resumable(tmp_path).train()
    (tmp_path / SCORES_FILE).unlink()
    assert contents(tmp_path) == before
    monkeypatch.undo()
    trainer = training_script.resumable(tmp_path)
    trainer.train()
    tiny.assert_same(training_script.result(trainer), uninterrupted[1])


WRITERS = {
    "delta configuration": (smt_trainer.delta.delta, "write_text"),
    "delta": (smt_trainer.delta.delta, "save_arrays"),
    "optimizer": (torch, "save", "optimizer"),
    "random state": (torch, "save", "rng_state"),
    "state of the trainer": (TrainerState, "save_to_json"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_the_previous_checkpoint_is_resumed(writer, uninterrupted, fills_up, monkeypatch, tmp_path):
    folder, expected = uninterrupted
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    before = contents(tmp_path)
    fills_up(*writer)
    with FULL:
        training_script.resumable(tmp_path).train(resume_from_checkpoint=True)
    left = contents(tmp_path)
    assert before.items() <= left.items()
    assert not any(Path(name).name.startswith(".") for name in left)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    if (tmp_path / "checkpoint-4" / DELTA_FILE).exists():
        load_delta(tiny.llama(), tmp_path / "checkpoint-4")
    monkeypatch.undo()
    trainer = training_script.resumable(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    tiny.assert_same(training_script.result(trainer), expected)


@pytest.mark.parametrize("function", ["write_text", "save_arrays"])
def test_a_folder_with_an_older_delta_of_other_blocks_holds_either_delta_whole(function, delta, fills_up):
    folder, older = delta
    newer = tiny.llama()
    convert_to_smt(newer, tiny.choose(newer, tiny.config(score="random", budget=11)))
    names = contents(folder).keys()
    fills_up(smt_trainer.delta.delta, function)
    with FULL:
        save_delta(newer, folder)
    assert contents(folder).keys() == names
    loaded = load_delta(tiny.llama(), folder)
    same = older if loaded.smt_state.selection.num_blocks == 12 else newer
    tiny.assert_same(dict(loaded.state_dict()), dict(same.state_dict()))


def test_an_earlier_delta_of_save_model_is_untouched(fills_up, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path / "out")
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    before = contents(tmp_path / "delta")
    trainer.train()
    fills_up(smt_trainer.delta.delta, "save_arrays")
    with FULL:
        trainer.save_model(tmp_path / "delta")
    assert contents(tmp_path / "delta") == before


def test_merge_and_save_leaves_no_partial_checkpoint(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path / "out")
    trainer.train()
    before = contents(tmp_path)
    with FULL, full_disk(ROOM):
        trainer.merge_and_save(tmp_path / "merged")
    assert contents(tmp_path) == before
    trainer.merge_and_save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(trainer.model))


def test_smt_merge_reports_the_error_and_leaves_no_partial_output(base, delta, tmp_path, capsys):
    before = contents(tmp_path)
    with full_disk(ROOM):
        assert main(["merge", str(base), str(delta[0]), str(tmp_path / "merged")]) == 2
    assert "merged could not be written" in capsys.readouterr().err
    assert contents(tmp_path) == before
