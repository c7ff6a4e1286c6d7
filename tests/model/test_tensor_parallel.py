"""The slices of weights that tensor parallelism cuts: arithmetic, and models cut for ranks of which only one exists."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from smt_trainer import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.tensor_parallel import Slice, style_of
from smt_trainer.selection.candidates import find_candidates

slices = pytest.importorskip("slices", reason="this transformers cuts models in another way", exc_type=ImportError)
EVERYWHERE = {"target_modules": "all-linear", "budget": 1}


@pytest.fixture
def model():
    with slices.silent_ranks(2):
        yield slices.cut(tiny.llama())


@st.composite
def cut_grids(draw):
    """Draw a grid, and the slices of all ranks, which its blocks fit."""
    dimension, ranks, parts = draw(st.integers(0, 1)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    small, other_edge, others = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        edge, extent = small, small * parts
    else:
        # Whole blocks make up the weight.
        ranks *= parts
        edge, extent = small * parts, small
    sizes, edges = [0, 0], [0, 0]
    sizes[dimension], edges[dimension] = extent * ranks, edge
    sizes[1 - dimension], edges[1 - dimension] = other_edge * others, other_edge
    return BlockGrid(*sizes, *edges), [Slice(dimension, rank * extent, extent) for rank in range(ranks)]


@given(cut_grids(), st.data())
def test_the_slices_of_all_ranks_hold_each_weight_of_the_chosen_blocks_once(cut_grid, data):
    grid, held = cut_grid
    rows, columns = grid.shape
    chosen = data.draw(st.lists(st.integers(0, rows * columns - 1), min_size=1, unique=True))
    indices = np.stack(np.unravel_index(chosen, grid.shape), 1)
    blocks = torch.arange(1.0, len(chosen) * grid.block_numel + 1).view(-1, *grid.block_shape)
    whole = torch.zeros(grid.stored_shape)
    grid.scatter_(whole, torch.from_numpy(indices), blocks)
    for one in held:
        assert one.fits(grid)
        mine, places = one.locate(grid, indices)
        own, parts = one.grid(grid), blocks[(torch.from_numpy(mine), *one.within_block(grid))]
        part = torch.zeros(own.stored_shape)
        own.scatter_(part, torch.from_numpy(places), parts)
        assert torch.equal(part, whole.narrow(one.dimension, one.first, one.extent))


def test_an_edge_that_fits_no_slice_is_refused_with_one_that_does(model):
    message = r"`model.layers.0.mlp.gate_proj` into slices of 48 rows, .* edge of 32 do not fit. Use block_size=16,"
    with pytest.raises(SMTError, match=message):
        find_candidates(model, tiny.config(**EVERYWHERE, block_size=32))
    find_candidates(model, tiny.config(**EVERYWHERE, block_size=16))


def test_what_is_cut_is_not_trained_whole(model):
    with pytest.raises(SMTError, match=r"`lm_head.weight` is to be trained whole, but tensor parallelism cuts it"):
        find_candidates(model, tiny.config(modules_to_save=["lm_head"]))
    find_candidates(model, tiny.config(train_norm=True))


def test_unequal_slices_are_left_out_and_named(caplog):
    with slices.silent_ranks(3), pytest.raises(SMTError, match="none of which can be tuned"):
        find_candidates(slices.cut(tiny.llama()), tiny.config(target_modules=["q_proj"]))
    assert "cuts its weight of 64x64 into unequal slices" in caplog.text


def test_experts_that_are_cut_are_left_out_and_named(caplog):
    model = tiny.build("Qwen3MoeForCausalLM", num_experts=4, moe_intermediate_size=32, num_key_value_heads=2)
    with slices.silent_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            for name, stack in list(layer.mlp.experts.named_parameters()):
                cut = distribute_tensor(stack.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(layer.mlp.experts, name, torch.nn.Parameter(cut))
        with pytest.raises(SMTError, match="none of which can be tuned"):
            find_candidates(model, tiny.config(target_modules="experts"))
    assert "its parameter is cut over ranks" in caplog.text


def test_a_module_without_a_plan_is_refused(model):
    assert style_of(model, "model.layers.1.mlp.down_proj") is not None
    with pytest.raises(SMTError, match=r"`model.norm` is cut over ranks, and the tp_plan of the Llama.* does not say"):
        style_of(model, "model.norm")
