"""Pushing to a mocked hub: each upload is a delta with its card."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers.trainer

from smt_trainer import from_delta
from smt_trainer.delta.delta import CONFIG_FILE, DELTA_FILE


@pytest.fixture
def uploads(monkeypatch):
    """Mock the hub; return a list with, for each upload, file name -> contents."""
    taken = []

    def upload_folder(folder_path, **kwargs):
        taken.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})
        return SimpleNamespace(is_done=lambda: True, done=lambda: True)

    def init_hf_repo(trainer, *args, **kwargs):
        trainer.hub_model_id = "me/tiny-delta"
        trainer.push_in_progress = None

    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    else:  # transformers before 5.23 calls the function directly
        monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", init_hf_repo)
    return taken


@pytest.fixture
def trainer(base, uploads, tmp_path):
    """Train from a base on disk, with a push at each of two checkpoints; return the trainer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    trainer = tiny.smt_trainer(
        model, tmp_path / "run", push_to_hub=True, save_strategy="steps", save_steps=2, hub_always_push=True
    )
    trainer.train()
    return trainer


def test_each_checkpoint_uploads_its_delta(trainer, uploads):
    assert len(uploads) == 2
    assert uploads[0][DELTA_FILE] != uploads[1][DELTA_FILE]
    for files in uploads:
        assert CONFIG_FILE in files and not any(name.startswith(("model", "pytorch_model")) for name in files)


def test_the_last_upload_is_a_delta_that_loads(trainer, uploads, base, tmp_path):
    trainer.push_to_hub()
    for name, content in uploads[-1].items():
        (tmp_path / "download").mkdir(exist_ok=True)
        (tmp_path / "download" / name).write_bytes(content)
    loaded = from_delta(tmp_path / "download", base=str(base))
    assert torch.equal(tiny.logits(loaded), tiny.logits(trainer.model))


def test_the_card_names_base_selection_budget_and_repository(trainer, uploads):
    trainer.push_to_hub()
    card = uploads[-1]["README.md"].decode()
    assert "trained values of 12 blocks of the weights of `base`" in card
    assert trainer.smt_selection.summary() in card
    assert "`score='grad_l1'`, `smt_warmup_steps=2`, `scope='global'`, `budget=12`" in card
    assert "`budget_of='model'`, `layer_cap=None`" in card
    assert 'from_delta(snapshot_download("me/tiny-delta"))' in card
