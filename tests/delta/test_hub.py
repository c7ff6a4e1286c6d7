"""Deltas by their name on the hub: pushed, loaded and merged."""

import json
from dataclasses import replace

import arithmetic
import huggingface_hub
import pytest
import tiny
import torch
import transformers

from smt_trainer import (
    SMTError,
    applied,
    convert_to_smt,
    diff_deltas,
    from_delta,
    load_delta,
    merge_and_unload,
    push_delta,
    save_delta,
)
from smt_trainer.cli import main
from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE
from smt_trainer.delta.hub import find_delta
from smt_trainer.model.base import base_name

LEFT_BY_RUNS = ["training_args.bin", "smt_scores.safetensors", "optimizer.pt", "checkpoint-2/smt_delta.safetensors"]


@pytest.fixture
def trained(hub, base, tmp_path):
    """Push a delta of a base on the hub twice, with other values; return commits and the logits of each."""
    hub.upload("someone/base", base)
    found = {}
    for name in ("first", "second"):
        model = transformers.AutoModelForCausalLM.from_pretrained("someone/base")
        convert_to_smt(model, replace(tiny.choose(model), base_model=base_name(model)))
        tiny.disturb(model)
        save_delta(model, tmp_path / name)
        for left in LEFT_BY_RUNS:
            (tmp_path / name / left).parent.mkdir(exist_ok=True)
            (tmp_path / name / left).write_bytes(b"left by a run")
        found[push_delta(tmp_path / name, "me/delta")] = tiny.logits(merge_and_unload(model))
    return found


def test_each_commit_is_a_delta_that_loads_by_name(trained):
    (first, second), (expected, newest) = trained, trained.values()
    tiny.assert_same(tiny.logits(from_delta("me/delta", revision=first)), expected)
    tiny.assert_same(tiny.logits(from_delta("me/delta", revision=second)), newest)
    tiny.assert_same(tiny.logits(from_delta("me/delta")), newest)
    assert not torch.equal(expected, newest)


def test_a_delta_is_put_into_a_model_by_name(trained, base):
    first, _ = trained
    model = load_delta(transformers.AutoModelForCausalLM.from_pretrained(base), "me/delta", revision=first, merge=True)
    tiny.assert_same(tiny.logits(model), trained[first])


def test_deltas_are_swapped_and_compared_by_name(trained, base, tmp_path):
    _, newest = trained.values()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with applied(model, "me/delta"):
        tiny.assert_same(tiny.logits(model), newest)
    assert diff_deltas("me/delta", tmp_path / "second").total.difference == 0
    assert diff_deltas(tmp_path / "first", "me/delta").total.difference > 0


def test_only_the_delta_is_sent_either_way(trained, hub, tmp_path):
    hub.upload("me/delta", tmp_path / "second")
    assert set(LEFT_BY_RUNS) <= hub.files("me/delta").keys()
    hub.sent.clear()
    find_delta("me/delta")
    assert hub.sent == [("me/delta", DELTA_FILE)]
    push_delta(tmp_path / "second", "me/new", revision="try", private=True)
    assert hub.files("me/new", "try").keys() == {".gitattributes", DELTA_FILE, MANIFEST_FILE, "README.md"}
    assert hub.files("me/new").keys() == {".gitattributes"}


def test_the_recorded_commit_of_the_base_is_loaded_even_if_the_base_moves_on(trained, hub, tmp_path):
    tiny.llama(seed=1).save_pretrained(tmp_path / "moved")
    hub.upload("someone/base", tmp_path / "moved")
    tiny.assert_same(tiny.logits(from_delta("me/delta")), [*trained.values()][1])
    with pytest.raises(SMTError, match=r"was trained on someone/base@.* has other values"):
        from_delta("me/delta", base_revision="main")


def test_the_command_line_merges_verifies_exports_and_unmerges_by_names_and_revisions(trained, hub, tmp_path, capsys):
    first, _ = trained
    base, merged = hub.repositories["someone/base"].branches["main"], tmp_path / "merged"
    tiny.llama(seed=1).save_pretrained(tmp_path / "moved")
    hub.upload("someone/base", tmp_path / "moved")
    names, revisions = ["someone/base", "me/delta"], ["--revision", base, "--delta-revision", first]
    assert main(["merge", *names, str(merged), *revisions]) == 0
    tiny.assert_same(tiny.logits(transformers.AutoModelForCausalLM.from_pretrained(merged)), trained[first])
    assert main(["verify", *names, str(merged), *revisions, "--logits"]) == 0
    assert main(["export", *names, str(tmp_path / "lora"), "--format", "lora", *revisions]) == 0
    assert main(["unmerge", *names, str(merged), str(tmp_path / "back"), *revisions]) == 0
    arithmetic.assert_equal(tiny.saved_tensors(tmp_path / "back"), tiny.saved_tensors(tmp_path / "base"))
    assert main(["unmerge", *names, str(merged), str(tmp_path / "other"), "--revision", base]) == 2
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", base)
    assert main(["merge", *names, str(tmp_path / "again"), "--revision", base]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() != (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("me/nothing", None, "the hub shows no repository of this name. Check the name; if it is private, log in"),
        ("me/delta", "v9", "it has no revision 'v9'. Its page lists branches, tags and commits."),
        ("someone/base", None, "smt_delta.safetensors is missing. Check the path or name."),
    ],
)
def test_a_delta_that_is_not_there_is_refused_in_a_line(name, revision, message, trained, tmp_path, capsys):
    given = [] if revision is None else ["--delta-revision", revision]
    assert main(["merge", "someone/base", name, str(tmp_path / "out"), *given]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"smt: no delta at {name}: ") and message in line
    with pytest.raises(SMTError, match=f"^no delta at {name}: "):
        from_delta(name, revision=revision)


def test_a_base_that_cannot_be_loaded_is_refused_saying_who_named_it(trained):
    with pytest.raises(SMTError, match=r"^the base 'me/no', which you gave, could not be loaded: .*pass base="):
        from_delta("me/delta", base="me/no")
    with pytest.raises(SMTError, match=r"^the base 'someone/base', which the delta in me/delta names, could not be"):
        from_delta("me/delta", base_revision="v9")


def test_without_a_connection_a_delta_comes_from_the_cache_or_is_refused(trained, monkeypatch):
    first, second = trained
    from_delta("me/delta")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tiny.assert_same(tiny.logits(from_delta("me/delta")), trained[second])
    with pytest.raises(SMTError, match=r"^no delta at me/delta: .* or HF_HUB_OFFLINE is set\. Connect, or give the f"):
        from_delta("me/delta", revision=first)


def test_pushing_where_the_hub_cannot_be_reached_is_refused(delta, monkeypatch):
    folder, _ = delta
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SMTError, match=r"^the delta could not be pushed to me/delta on the hub .*Check the connection, log in"
    ):
        push_delta(folder, "me/delta")


def test_a_folder_has_no_revision(delta):
    folder, _ = delta
    with pytest.raises(SMTError, match=r"is a folder, which has no revision 'v1'"):
        from_delta(folder, revision="v1")
