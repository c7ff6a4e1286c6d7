import copy
import weakref

import pytest
import quantised
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.quantised import compute_dtype, dequantised

pytest.importorskip("bitsandbytes")
from smt_trainer.sparse.quantised_linear import block_linear_of

GRID = BlockGrid(64, 128, 16, 32)
INDICES = torch.tensor([[0, 1], [3, 2], [1, 1], [2, 0]])
KINDS = list(quantised.KINDS)


def rewritten(linear, dtype, master=torch.float32):
    linear.dense_dtype = dtype
    return block_linear_of(linear).from_plain(linear, GRID, INDICES, master)


def run(linear, x, dy):
    """Return y, dx and the gradients of the trained parameters."""
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(dy)
    return y.detach(), x.grad, {name: each.grad for name, each in linear.named_parameters() if each.requires_grad}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def case(dtype):
    return torch.randn(3, 5, 128, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_before_training_a_linear_is_bit_for_bit_that_of_bitsandbytes(kind, dtype, case):
    linear = quantised.make_linear(kind, dtype=dtype)
    y, dx, _ = run(copy.deepcopy(linear), *case)
    tiny.assert_same(run(rewritten(linear, dtype), *case)[:2], (y, dx))


def test_before_training_an_8_bit_linear_differs_by_the_rounding_of_its_inputs(dtype, case):
    linear = quantised.make_linear("int8", dtype=dtype)
    y, dx, _ = run(copy.deepcopy(linear), *case)
    ours = run(rewritten(linear, dtype), *case)
    # Inputs up to 4 in steps of 1/32, times 128 weights of up to 0.09.
    torch.testing.assert_close(ours[0], y, rtol=0, atol=0.05)
    torch.testing.assert_close(ours[1], dx, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_dense_linear_of_the_dequantised_weight_with_the_blocks_in_it(kind, bias, dtype, case):
    linear = quantised.make_linear(kind, dtype=dtype, bias=bias)
    dense = nn.Linear(128, 64, bias=bias, dtype=dtype)
    dense.weight.data = dequantised(linear, dtype)
    if bias:
        dense.bias.data = linear.bias.data.clone()
    linear = rewritten(linear, dtype)
    with torch.no_grad():
        linear.blocks += torch.randn_like(linear.blocks)
    GRID.scatter_(dense.weight.data, linear.block_indices, linear.blocks.detach())
    y, dx, gradients = run(linear, *case)
    expected = run(dense, *case)
    tiny.assert_same((y, dx), expected[:2])
    wanted = GRID.gather(expected[2]["weight"], linear.block_indices)
    # Another order of the sums.
    torch.testing.assert_close(
        gradients["blocks"], wanted.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_output_has_the_dtype_of_its_input_under_autocast_too(kind):
    linear = rewritten(quantised.make_linear(kind), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 128)
        assert linear(x).dtype == torch.float32
        assert compute_dtype(linear, x) == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dense_is_saved_for_backward(kind, case):
    linear, saved = rewritten(quantised.make_linear(kind), torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(case[0].clone().requires_grad_())
    dense = 2 * GRID.out_features * GRID.in_features
    assert saved
    assert all(tensor.nbytes < dense for tensor in saved)


def test_the_positions_of_a_quantised_linear_are_saved_with_it():
    linear = rewritten(quantised.make_linear("nf4"), torch.bfloat16)
    keys = linear.state_dict().keys()
    assert {"weight", "bias", "blocks", "block_indices"} <= keys
    assert "weight.absmax" in keys


@pytest.mark.parametrize("kind", KINDS)
def test_to_linear_leaves_a_plain_linear_that_computes_the_same(kind, case):
    linear = rewritten(quantised.make_linear(kind), torch.bfloat16)
    with torch.no_grad():
        linear.blocks += 1
    x = case[0].bfloat16()
    expected = linear(x).detach()
    plain = linear.to_plain()
    assert type(plain) is nn.Linear
    assert plain.state_dict().keys() == {"weight", "bias"}
    assert vars(plain).keys() == vars(nn.Linear(1, 1)).keys()
    tiny.assert_same(plain(x), expected)
    tiny.assert_same(plain(x), F.linear(x, plain.weight, plain.bias))


def test_a_copy_trains_its_own_blocks():
    linear = rewritten(quantised.make_linear("nf4"), torch.bfloat16)
    twin, x = copy.deepcopy(linear), torch.randn(4, 128).bfloat16()
    tiny.assert_same(twin(x), linear(x))
    with torch.no_grad():
        twin.blocks += 1
    assert not torch.equal(twin(x), linear(x))


@pytest.mark.parametrize("kind", KINDS)
def test_only_autograd_holds_the_input(kind):
    linear, x = rewritten(quantised.make_linear(kind), torch.bfloat16), torch.randn(4, 128).bfloat16()
    reference = weakref.ref(x)
    # Saved nowhere: what a checkpointed layer would do.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, lambda shape: torch.zeros(shape)):
        y = linear(x)
    del x
    assert y.requires_grad
    assert reference() is None


def test_blocks_that_change_before_backward_are_noticed():
    linear = rewritten(quantised.make_linear("nf4"), torch.bfloat16)
    y = linear(torch.randn(4, 128).bfloat16().requires_grad_())
    with torch.no_grad():
        linear.blocks += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
