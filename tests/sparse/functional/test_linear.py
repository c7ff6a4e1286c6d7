"""The sparse linear's forward, gradients, memory and cost."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import block
from strategies import some_blocks
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.functional.linear import Group, group_blocks, sparse_linear

# Row, column, block and non-square block grids of one weight, with adjacent and scattered blocks.
GRIDS = {
    "square": (BlockGrid(12, 8, 4, 4), [[0, 0], [2, 0], [1, 1]]),
    "non-square": (BlockGrid(12, 8, 2, 4), [[5, 1], [0, 0], [1, 0], [4, 1]]),
    "row": (BlockGrid(12, 8, 1, 8), [[3, 0], [11, 0], [4, 0]]),
    "column": (BlockGrid(12, 8, 12, 1), [[0, 7], [0, 2], [0, 3]]),
    "one line of columns": (BlockGrid(12, 8, 4, 2), [[1, 0], [1, 1], [1, 3]]),
    "runs of wide blocks": (BlockGrid(48, 8, 8, 4), [[0, 0], [2, 0], [3, 0], [5, 0], [0, 1], [2, 1], [3, 1], [5, 1]]),
    "whole weight": (BlockGrid(12, 8, 12, 8), [[0, 0]]),
}
GRIDS |= {f"{name}, transposed": (replace(grid, transposed=True), chosen) for name, (grid, chosen) in GRIDS.items()}


def prepare(grid, block_indices, dtype=torch.float64, leading=(5,), bias=True, master=None):
    """Make inputs of `sparse_linear` and the stored block indices; all floats but the weight require a gradient."""
    plan, stored, positions = group_blocks(torch.as_tensor(block_indices), grid)
    weight = torch.randn(grid.stored_shape, dtype=dtype)
    x = torch.randn(*leading, grid.in_features, dtype=dtype, requires_grad=True)
    offset = torch.randn(grid.out_features, dtype=dtype, requires_grad=True) if bias else None
    blocks = grid.gather(weight, stored).to(master or dtype).requires_grad_(True)
    return (x, weight, offset, blocks, positions, plan), stored


def dense_linear(x, weight, bias, grid):
    """Compute what `nn.Linear` does, or `Conv1D` for a transposed grid."""
    if not grid.transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return Conv1D.forward(SimpleNamespace(nf=grid.out_features, weight=weight, bias=bias), x)


def dense_gradients(x, weight, bias, dy, stored, grid):
    """Compute gradients of x, bias and the blocks by autograd through a dense linear."""
    x, weight = (tensor.detach().clone().requires_grad_(True) for tensor in (x, weight))
    bias = None if bias is None else bias.detach().clone().requires_grad_(True)
    dense_linear(x, weight, bias, grid).backward(dy)
    blocks = torch.stack([block(weight.grad, grid, row, column) for row, column in stored.tolist()])
    return x.grad, None if bias is None else bias.grad, blocks


@given(some_blocks())
def test_the_plan_covers_each_block_exactly_once(case):
    grid, block_indices = case
    plan, stored, positions = group_blocks(block_indices, grid)
    assert sorted(stored.tolist()) == sorted(block_indices.tolist())
    assert [group.first for group in plan.groups] == [0, *(group.last for group in plan.groups[:-1])]
    edge = grid.block_rows if plan.by_column else grid.block_columns
    covered = []
    for group in plan.groups:
        offsets = [start + step for start, length in group.runs for step in range(length)]
        assert all(start + length < later for (start, length), (later, _) in pairwise(group.runs))
        pairs = [(line, offset) for line in range(group.line, group.line + group.lines) for offset in offsets]
        assert len(pairs) == group.last - group.first
        covered += [(offset, line) if plan.by_column else (line, offset) for line, offset in pairs]
    assert covered == [tuple(index) for index in stored.tolist()]
    features = [
        offset * edge + step
        for row, column in covered
        for offset in [row if plan.by_column else column]
        for step in range(edge)
    ]
    assert positions.tolist() == features


def test_neighbouring_lines_with_the_same_blocks_are_one_product():
    grid = BlockGrid(12, 12, 2, 2)
    every_other_row = [[row, column] for row in (0, 2, 4) for column in (1, 2, 3, 5)]
    plan, *_ = group_blocks(torch.tensor([*every_other_row, [1, 5]]), grid)
    assert [(group.line, group.lines, len(group.runs)) for group in plan.groups] == [(1, 3, 3), (5, 1, 2)]
    whole, *_ = group_blocks(torch.cartesian_prod(torch.arange(6), torch.arange(6)), grid)
    assert whole.groups == (Group(0, 36, 0, 6, ((0, 6),)),)


@settings(max_examples=40)
@given(some_blocks(), st.sampled_from([(3,), (1,), (2, 3), (2, 1, 2)]), st.booleans())
def test_gradcheck_in_float64(case, leading, bias):
    grid, block_indices = case
    (x, weight, offset, blocks, positions, plan), stored = prepare(grid, block_indices, leading=leading, bias=bias)

    def forward(x, blocks, offset=None):
        dense = weight.clone()
        grid.scatter_(dense, stored, blocks.detach())
        return sparse_linear(x, dense, offset, blocks, positions, plan)

    assert torch.autograd.gradcheck(forward, (x, blocks, offset) if bias else (x, blocks))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("case", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_gradients_are_the_blocks_of_the_dense_gradient(case, leading, bias, dtype, tolerance):
    grid, block_indices = case
    (x, weight, offset, blocks, positions, plan), stored = prepare(grid, block_indices, dtype, leading, bias)
    y = sparse_linear(x, weight, offset, blocks, positions, plan)
    assert torch.equal(y, dense_linear(x, weight, offset, grid))
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = dense_gradients(x, weight, offset, dy, stored, grid)
    gradients = (x.grad, None if offset is None else offset.grad, blocks.grad)
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", GRIDS.values(), ids=GRIDS)
def test_bfloat16_weights_give_float32_masters_a_float32_gradient(case):
    grid, block_indices = case
    inputs, stored = prepare(grid, block_indices, torch.bfloat16, leading=(64,), master=torch.float32)
    x, weight, offset, blocks, *_ = inputs
    y = sparse_linear(*inputs)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dense_gradients(x.double(), weight.double(), offset.double(), dy.double(), stored, grid)[2]
    assert y.dtype == x.grad.dtype == torch.bfloat16 and blocks.grad.dtype == torch.float32
    # A product in bfloat16 is summed in float32 and rounded once, to eight bits.
    torch.testing.assert_close(blocks.grad.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("case", ["square", "square, transposed"])
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(case):
    grid, block_indices = GRIDS[case]
    inputs, stored = prepare(grid, block_indices, torch.float32, leading=(64,))
    x, weight, offset, blocks, *_ = inputs
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(*inputs)
        assert torch.equal(y, dense_linear(x, weight, offset, grid))
    dy = torch.randn_like(y)
    y.backward(dy)
    rounded = (tensor.detach().bfloat16().double() for tensor in (x, weight, offset))
    exact = dense_gradients(*rounded, dy.double(), stored, grid)
    gradients = (x.grad, offset.grad, blocks.grad)
    assert y.dtype == torch.bfloat16 and {gradient.dtype for gradient in gradients} == {torch.float32}
    for gradient, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("leading", [(7,), (2, 3)])
@pytest.mark.parametrize("case", ["square", "square, transposed"])
def test_an_output_may_be_changed_in_place(case, leading):
    grid, indices = GRIDS[case]
    (x, weight, bias, blocks, *rest), _ = prepare(grid, indices, leading=leading)
    F.relu(sparse_linear(x, weight, bias, blocks, *rest), inplace=True).sum().backward()
    x_dense, dense = x.detach().requires_grad_(), weight.clone().requires_grad_()
    F.relu(dense_linear(x_dense, dense, bias.detach(), grid)).sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(blocks.grad, grid.gather(dense.grad, group_blocks(torch.as_tensor(indices), grid)[1]))


@pytest.mark.parametrize("leading", [(0,), (0, 3)])
@pytest.mark.parametrize("case", ["square", "square, transposed"])
def test_an_empty_batch_gives_zero_gradients(case, leading):
    inputs, _ = prepare(*GRIDS[case], leading=leading)
    y = sparse_linear(*inputs)
    y.sum().backward()
    x, _, offset, blocks, *_ = inputs
    assert y.shape == (*leading, 12) and x.grad.shape == x.shape
    assert not offset.grad.any() and not blocks.grad.any()


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("case", GRIDS.values(), ids=GRIDS)
def test_backward_costs_the_chosen_blocks_and_dx_only_if_needed(case, needs_dx):
    grid, block_indices = case
    inputs, _ = prepare(grid, block_indices, leading=(5,), bias=False)
    inputs[0].requires_grad_(needs_dx)
    y = sparse_linear(*inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    dx_weights = grid.out_features * grid.in_features if needs_dx else 0
    assert counter.get_total_flops() == 2 * 5 * (len(block_indices) * grid.block_numel + dx_weights)


@pytest.mark.parametrize("autocast", [False, True])
def test_linears_on_one_input_hold_that_input_once(autocast):
    grid, block_indices = GRIDS["square"]
    layers = [prepare(grid, block_indices, torch.float32)[0] for _ in "qkv"]
    x = torch.randn(2, 3, grid.in_features, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for layer in layers for tensor in (layer[1], layer[4])}
    held = set()

    def note(tensor):
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        _ = [sparse_linear(x, *layer[1:]) for layer in layers]
    assert held - known == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("case", GRIDS.values(), ids=GRIDS)
def test_compiling_in_one_graph_gives_the_same_gradients(case):
    torch.compiler.reset()
    inputs, _ = prepare(*case)
    x, _, offset, blocks, *_ = inputs
    expected = torch.autograd.grad(sparse_linear(*inputs).square().sum(), (x, offset, blocks))
    compiled = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*inputs).square().sum(), (x, offset, blocks))
    torch.testing.assert_close(gradients, expected, rtol=1e-13, atol=1e-13)


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs, _ = prepare(*GRIDS["square"])
    (dx,) = torch.autograd.grad(sparse_linear(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_models_projections_hold_their_input_once(llama):
    from smt_trainer import convert_to_smt

    convert_to_smt(llama, tiny.every_block(llama, [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]))
    attention = llama.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    own = {tensor.untyped_storage().data_ptr() for layer in layers for tensor in (layer.weight, layer.positions)}
    x, held = torch.randn(2, 3, 64), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        _ = [layer(x) for layer in layers]
    assert held - own == {x.untyped_storage().data_ptr()}
