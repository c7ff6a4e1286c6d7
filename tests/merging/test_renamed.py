"""Deltas on checkpoints whose tensors get other names on loading; `tests/contracts/test_families.py` has others."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from families import FAMILIES
from round_trips import assert_composed_and_unmerged_exactly, assert_patches_merge
from safetensors.torch import save_file

from smt_trainer import Delta, SMTError, convert_to_smt, export_lora, merge_checkpoint
from smt_trainer.merging.locate import find_keys
from smt_trainer.model.checkpoint import SINGLE_FILE, Checkpoint


@pytest.fixture
def trained(tmp_path):
    """Train blocks of a model of images and text; return it and the folder of its base and delta."""
    FAMILIES["LLaVA"].build().save_pretrained(tmp_path / "base")
    model = type(FAMILIES["LLaVA"].build()).from_pretrained(tmp_path / "base")
    convert_to_smt(model, tiny.choose(model))
    tiny.disturb(model)
    Delta.of(model).save(tmp_path / "delta")
    return model, tmp_path


def test_the_base_has_other_names(trained):
    _, folder = trained
    names = tiny.saved_tensors(folder / "base")
    assert not any(f"{name}.weight" in names for name in Delta.load(folder / "delta").blocks)


def test_another_base_is_refused(trained):
    model, folder = trained
    type(model)(model.config).save_pretrained(folder / "other")
    with pytest.raises(SMTError, match=r"another base|differ"):
        merge_checkpoint(folder / "other", folder / "delta", folder / "merged")


def test_a_base_that_differs_only_under_another_name_is_refused(trained):
    model, folder = trained
    other = type(model).from_pretrained(folder / "base")
    with torch.no_grad():
        other.model.language_model.layers[1].mlp.down_proj.weight += 1
    other.save_pretrained(folder / "other")
    with pytest.raises(SMTError, match=r"another base|differ"):
        merge_checkpoint(folder / "other", folder / "delta", folder / "merged")


def test_a_base_of_an_unknown_class_is_refused(trained):
    _, folder = trained
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OwnModel"]}))
    with pytest.raises(SMTError, match=r"has no tensor .*renames.*merge in memory instead: from_delta"):
        merge_checkpoint(folder / "base", folder / "delta", folder / "merged")


def test_patches_have_the_names_of_the_base(trained):
    _, folder = trained
    assert_patches_merge(folder)


def test_what_is_composed_and_taken_out_again_is_exact(trained):
    _, folder = trained
    assert_composed_and_unmerged_exactly(folder)


def test_an_adapter_has_the_names_of_the_model(trained):
    _, folder = trained
    export_lora(folder / "base", folder / "delta", folder / "adapter", max_rank=64)
    names = tiny.saved_tensors(folder / "adapter")
    modules = Delta.load(folder / "delta").blocks
    assert names and {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names} == set(modules)


def test_a_name_is_not_taken_for_another_that_only_ends_alike(tmp_path):
    names = {
        "model.language_model.norm.weight": "norm.weight",
        "model.projector.norm.weight": "pre_projector_norm.weight",
    }
    save_file({key: torch.ones(4) for key in names.values()}, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.conversions.renamed.update(names)
    checkpoint.conversions.are_known = True
    delta = SimpleNamespace(whole_arrays={"model.projector.norm.weight": None})
    assert find_keys(delta, checkpoint) == {"model.projector.norm.weight": "pre_projector_norm.weight"}
    assert checkpoint.loaded.keys() == names.keys()
