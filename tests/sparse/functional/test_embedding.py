"""An embedding that forms the gradient of chosen blocks only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.functional.embedding import place_tokens, sparse_embedding


def blocks_of(grid: BlockGrid, chosen: list[int]) -> torch.Tensor:
    return torch.stack(torch.unravel_index(torch.tensor(chosen), grid.shape), dim=1)


@given(st.data())
def test_the_blocks_get_the_gradient_of_the_dense_embedding(data):
    shape = data.draw(st.sampled_from([(1, 6), (12, 1), (1, 1), (4, 3), (2, 6), (12, 6)]))
    grid = BlockGrid(12, 6, *shape, embedding=True)
    chosen = data.draw(st.lists(st.integers(0, grid.num_blocks - 1), min_size=1, unique=True))
    padding = data.draw(st.none() | st.integers(0, 11))
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 11), min_size=3, max_size=3), min_size=1)))
    dense, indices = nn.Embedding(12, 6, padding, dtype=torch.float64), blocks_of(grid, chosen)
    y = dense(ids)
    dy = torch.randn_like(y)
    y.backward(dy)
    blocks = grid.gather(dense.weight.detach(), indices).requires_grad_()
    ours = sparse_embedding(ids, dense.weight.detach(), blocks, *place_tokens(indices, grid, padding))
    assert torch.equal(ours, y)
    ours.backward(dy)
    torch.testing.assert_close(blocks.grad, grid.gather(dense.weight.grad, indices))


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_gradients_are_those_of_finite_differences(shape):
    grid, ids = BlockGrid(6, 4, *shape, embedding=True), torch.tensor([[5, 1, 1], [0, 5, 2]])
    weight, indices = torch.randn(6, 4, dtype=torch.float64), blocks_of(grid, [2, 0])
    places = place_tokens(indices, grid, None)

    def of(blocks):
        # Forward reads the weight, so finite differences have to change it.
        grid.scatter_(weight, indices, blocks.detach())
        return sparse_embedding(ids, weight.clone(), blocks, *places)

    assert torch.autograd.gradcheck(of, grid.gather(weight, indices).requires_grad_())


def test_backward_keeps_no_tensor_as_large_as_the_weight_or_the_output():
    grid, ids = BlockGrid(64, 32, 1, 32, embedding=True), torch.arange(48).view(2, 24)
    indices, kept = blocks_of(grid, [3, 7]), []
    blocks = torch.randn(2, 1, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        sparse_embedding(ids, torch.randn(64, 32), blocks, *place_tokens(indices, grid, None))
    assert max(one.numel() for one in kept) == 64 and not any(one.is_floating_point() for one in kept)
