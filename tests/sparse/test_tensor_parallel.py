"""Linears that tensor parallelism cuts, in one process that is all ranks. Runs on two are in `runs/test_sharded.py`."""

import copy

import pytest
import tiny
import torch
from torch import nn

from smt_trainer import SMTError, convert_to_smt, merge_and_unload
from smt_trainer.sparse.block_module import block_modules

slices = pytest.importorskip("slices", reason="this transformers cuts models in another way", exc_type=ImportError)


def trained(model: nn.Module, selection) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Train two steps in float64; return the model, and the gradients of the last step."""
    convert_to_smt(model, selection)
    optimizer = torch.optim.SGD((one for one in model.parameters() if one.requires_grad), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    return model, {name: linear.blocks.grad for name, linear in block_modules(model)}


@pytest.fixture
def both(tmp_path):
    """Return a trained model, and one that was cut and trained alike."""
    selection = tiny.choose(
        tiny.llama(), tiny.config(target_modules="all-linear", score="random", master_dtype="float64")
    )
    with slices.only_rank(tmp_path):
        plain = trained(tiny.llama().double(), selection)
        yield plain, trained(slices.cut(tiny.llama().double()), selection)


def test_a_cut_model_trains_as_a_whole_one(both):
    (plain, expected), (model, found) = both
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    assert torch.allclose(tiny.logits(model), tiny.logits(plain), rtol=1e-12, atol=1e-12)


def test_values_set_without_a_trace_are_written_before_evaluation(both):
    _, (model, _) = both
    _, linear = next(block_modules(model))
    linear.blocks.data += 1
    model.eval()
    assert torch.equal(linear.grid.gather(linear.weight.full_tensor(), linear.block_indices), linear.blocks)


def test_merging_leaves_the_cut_model_as_it_was_loaded(both):
    _, (model, _) = both
    weights = {name: linear.merged_weight() for name, linear in block_modules(model)}
    logits = tiny.logits(model)
    merged = merge_and_unload(model)
    assert not any(block_modules(merged))
    for name, weight in weights.items():
        linear = merged.get_submodule(name)
        assert type(linear) is nn.Linear and torch.equal(linear.weight.full_tensor(), weight)
    assert torch.equal(tiny.logits(merged), logits)
    merged.requires_grad_(True)
    merged(**tiny.batch()).loss.backward()
    assert all(merged.get_submodule(name).weight.grad is not None for name in weights)


def test_copies_which_would_compute_with_the_weights_of_the_original_are_refused(tmp_path):
    selection = tiny.choose(tiny.llama(), tiny.config(score="random"))
    with slices.only_rank(tmp_path):
        model = slices.cut(tiny.llama())
        copied = copy.deepcopy(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        assert torch.equal(tiny.logits(copied), tiny.logits(model))
        with pytest.raises(SMTError, match=r"of this copy of a model computes.* Load the model once more"):
            convert_to_smt(copied, selection)
        convert_to_smt(model, selection)
        with pytest.raises(SMTError, match=r"cannot be copied.*Save the delta"):
            copy.deepcopy(model)
        assert copy.deepcopy(merge_and_unload(model)) is not model
