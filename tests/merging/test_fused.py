"""Deltas on checkpoints that store several matrices as one tensor, which loading splits."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from architectures import GROUPED
from round_trips import assert_composed_and_unmerged_exactly, assert_patches_merge

from smt_trainer import (
    Delta,
    SMTError,
    convert_to_smt,
    export_lora,
    merge_and_unload,
    merge_checkpoint,
    verify_merge,
)
from smt_trainer.merging.site import Site
from smt_trainer.model.grid import BlockGrid

needs_model = pytest.mark.skipif(
    not hasattr(transformers, "HrmTextForCausalLM"), reason=f"transformers {transformers.__version__} has no HRM-Text"
)
FUSED = (".gqkv_proj.weight", ".gate_up_proj.weight")


@pytest.fixture
def trained(tmp_path):
    """Train blocks of a model whose q, k and v, and gate and up projections, share a tensor on disk; return it and the
    folder of its base and delta."""
    kind = transformers.HrmTextForCausalLM
    tiny.build(kind.__name__, **GROUPED).save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base")
    smt_config = tiny.config(target_modules="all-linear", scope="per_module", budget=2, score="random")
    convert_to_smt(model, tiny.choose(model, smt_config))
    tiny.disturb(model)
    Delta.of(model).save(tmp_path / "delta")
    return model, tmp_path


def load_base(folder):
    """Load the base as it was before training."""
    return transformers.HrmTextForCausalLM.from_pretrained(folder / "base")


@needs_model
def test_merging_changes_the_blocks_in_the_fused_tensors_and_nothing_else(trained):
    model, folder = trained
    merge_checkpoint(folder / "base", folder / "delta", folder / "merged")
    assert not verify_merge(folder / "base", folder / "delta", folder / "merged").problems
    before, after = tiny.saved_tensors(folder / "base"), tiny.saved_tensors(folder / "merged")
    changed = {name: int((after[name] != before[name]).sum()) for name in before}
    selection = model.smt_state.selection
    assert sum(changed.values()) == sum(len(found) for found in selection.block_indices.values()) * 16 * 16
    assert any(changed[name] for name in before if name.endswith(FUSED[0]))
    assert any(changed[name] for name in before if name.endswith(FUSED[1]))
    merged = type(model).from_pretrained(folder / "merged").state_dict()
    tiny.assert_same(merged, merge_and_unload(model).state_dict())


@needs_model
def test_a_wrong_value_among_the_other_rows_is_found(trained):
    _, folder = trained
    merge_checkpoint(folder / "base", folder / "delta", folder / "merged")
    other = type(trained[0]).from_pretrained(folder / "merged")
    weight = other.get_parameter("model.L_module.layers.0.self_attn.gate_proj.weight")
    untouched = (
        weight == load_base(folder).get_parameter("model.L_module.layers.0.self_attn.gate_proj.weight")
    ).nonzero()
    with torch.no_grad():
        weight[tuple(untouched[0])] += 1
    other.save_pretrained(folder / "merged")
    problems = dict(verify_merge(folder / "base", folder / "delta", folder / "merged").problems)
    assert "1 of" in problems["model.L_module.layers.0.attn.gqkv_proj.weight"]


@needs_model
def test_a_base_that_differs_in_a_fused_tensor_is_refused(trained):
    _, folder = trained
    other = load_base(folder)
    with torch.no_grad():
        other.model.L_module.layers[1].mlp.up_proj.weight += 1
    other.save_pretrained(folder / "other")
    with pytest.raises(SMTError, match=r"another base|differ"):
        merge_checkpoint(folder / "other", folder / "delta", folder / "merged")


@needs_model
def test_patches_have_the_names_and_rows_of_the_base(trained):
    _, folder = trained
    assert_patches_merge(folder)


@needs_model
def test_what_is_composed_and_taken_out_again_is_exact(trained):
    _, folder = trained
    assert_composed_and_unmerged_exactly(folder)


@needs_model
def test_an_adapter_makes_the_trained_model(trained):
    peft = pytest.importorskip("peft")
    model, folder = trained
    export_lora(folder / "base", folder / "delta", folder / "adapter", max_rank=64)
    adapted = peft.PeftModel.from_pretrained(load_base(folder), folder / "adapter").merge_and_unload().state_dict()
    for name, tensor in merge_and_unload(model).state_dict().items():
        torch.testing.assert_close(adapted[name], tensor)


@pytest.mark.parametrize(("first", "total"), [(0, 32), (16, 48), (12, 40), (6, 29)])
def test_a_matrix_may_begin_at_any_row_of_a_tensor(first, total):
    rng = np.random.default_rng(0)
    grid, indices = BlockGrid(16, 24, 8, 4), np.array([[0, 1], [1, 0], [1, 5]])
    site = Site("q", grid, indices, rng.normal(size=(3, 8, 4)))
    matrix, tensor = np.zeros((16, 24)), np.zeros((total, 24))
    site.put(matrix, site.blocks)
    inside = site.rows(-first, total)
    inside.put(tensor, inside.blocks)
    assert inside.grid.stored_shape == tensor.shape
    assert np.array_equal(tensor[first : first + 16], matrix) and np.count_nonzero(tensor) == np.count_nonzero(matrix)
