"""Bases by their name on the hub."""

import huggingface_hub
import pytest
import tiny
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError
from smt_trainer.model.base import base_name
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, find_checkpoint

OTHER_FORMATS = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "onnx/model.onnx", "x.pt"]


def upload(hub, folder, **saving):
    """Put a base with its weights in other formats on the hub; return the hash of the commit."""
    tiny.llama().save_pretrained(folder, **saving)
    for name in OTHER_FORMATS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no weights")
    return hub.upload("someone/base", folder)


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
def test_only_the_weights_that_transformers_would_read_are_fetched(saving, hub, tmp_path):
    commit = upload(hub, tmp_path / "base", **saving)
    found = find_checkpoint("someone/base", None)
    here, there = Checkpoint.open(found), Checkpoint.open(tmp_path / "base")
    assert found.name == commit
    assert [
        file for file in there.files if (found / file).read_bytes() != (tmp_path / "base" / file).read_bytes()
    ] == []
    assert here.index == there.index == (INDEX_FILE if saving else None)
    sent = [name for _, name in hub.sent]
    assert len(sent) == len(set(sent)) and not set(sent) & set(OTHER_FORMATS)


def test_a_revision_is_a_branch_or_a_commit(hub, tmp_path):
    first = upload(hub, tmp_path / "base")
    tiny.llama(seed=1).save_pretrained(tmp_path / "other")
    hub.upload("someone/base", tmp_path / "other", branch="other")
    weights = {
        revision: (find_checkpoint("someone/base", revision) / SINGLE_FILE).read_bytes()
        for revision in (None, "main", first, "other")
    }
    assert weights[None] == weights["main"] == weights[first] == (tmp_path / "base" / SINGLE_FILE).read_bytes()
    assert weights["other"] == (tmp_path / "other" / SINGLE_FILE).read_bytes()


def test_what_was_fetched_is_found_without_a_connection(hub, tmp_path, monkeypatch):
    upload(hub, tmp_path / "base", max_shard_size="50KB")
    fetched = find_checkpoint("someone/base", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint("someone/base", None) == fetched
    with pytest.raises(SMTError, match=r"no base at someone/else: .* HF_HUB_OFFLINE is set\. Connect, or give the fol"):
        find_checkpoint("someone/else", None)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "someone/nothing",
            None,
            r"the hub shows no repository of this name\. Check the name; if it is ",
        ),
        ("someone/base", "v9", r"it has no revision 'v9'\. Its page lists branches, tags and commits"),
        ("someone/base", "0" * 40, r"it has no revision '0{40}'"),
        ("/no/such/folder", None, r"it is not a folder, and cannot be a name on the hub\. Check the path"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(name, revision, message, hub, tmp_path):
    upload(hub, tmp_path / "base")
    with pytest.raises(SMTError, match=f"^no base at {name}: .*{message}"):
        find_checkpoint(name, revision)
    assert not [name for _, name in hub.sent if name.endswith("safetensors")]


def test_a_file_is_no_folder(base):
    with pytest.raises(SMTError, match=r"model\.safetensors is a file\. Give the folder"):
        find_checkpoint(base / "model.safetensors", None)


def test_a_folder_has_no_revision(base):
    with pytest.raises(SMTError, match=r"is a folder, which has no revision 'v1'"):
        find_checkpoint(base, "v1")


def test_the_commit_of_a_loaded_model_is_known_unless_the_cache_has_other_weights(hub, tmp_path):
    first = upload(hub, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained("someone/base")
    assert base_name(model) == f"someone/base@{first}"
    (tmp_path / "base" / "README.md").write_text("a new card")
    second = upload(hub, tmp_path / "base")
    assert base_name(AutoModelForCausalLM.from_pretrained("someone/base")) == f"someone/base@{second}"
    tiny.llama(seed=1).save_pretrained(tmp_path / "other")
    third = hub.upload("someone/base", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained("someone/base")
    # Older versions of transformers say which commit a model was loaded from.
    said = getattr(model.config, "_commit_hash", None)
    assert base_name(model) == (f"someone/base@{third}" if said else "someone/base")


def test_a_model_from_a_folder_that_is_gone_has_no_commit(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    base.rename(base.with_name("away"))
    assert base_name(model) == str(base)
