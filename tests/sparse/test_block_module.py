"""`SMTLinear` and `SMTConv1D`: rewritten and undone in place, with weight and blocks always in step."""

import copy

import pytest
import tiny
import torch
from reference import block_mask
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_trainer import convert_to_smt
from smt_trainer.model.grid import BlockGrid
from smt_trainer.sparse.block_module import BlockModule, block_modules
from smt_trainer.sparse.linear import SMTConv1D, SMTLinear
from smt_trainer.sparse.write_back import write_back

BLOCK_INDICES = torch.tensor([[0, 1], [2, 0]])


class NamedLinear(nn.Linear):
    """A subclass of `nn.Linear`, like FalconLinear."""


class FromInToOut(Conv1D):
    """A subclass of `Conv1D` with its arguments swapped."""

    def __init__(self, nx: int, nf: int) -> None:
        super().__init__(nf, nx)


KINDS = [nn.Linear, NamedLinear, FromInToOut]


@pytest.fixture(params=[nn.Linear, FromInToOut], ids=["Linear", "Conv1D"])
def kind(request) -> type[nn.Module]:
    return request.param


def grid_of(kind) -> BlockGrid:
    return BlockGrid(48, 32, 16, 16, transposed=issubclass(kind, Conv1D))


def rewrite(linear: nn.Module) -> BlockModule:
    smt_class = SMTConv1D if isinstance(linear, Conv1D) else SMTLinear
    return smt_class.from_plain(linear, grid_of(type(linear)), BLOCK_INDICES, torch.float32)


def smt_linear(kind, dtype=torch.float32) -> BlockModule:
    return rewrite(kind(32, 48).to(dtype))


def shift(layer: BlockModule, by: float = 1.0) -> None:
    """Do what an optimizer does: change the blocks, not the weight."""
    with torch.no_grad():
        layer.blocks += by


@pytest.mark.parametrize("kind", KINDS)
def test_rewriting_keeps_identity_keys_bias_weight_and_hooks(kind):
    calls = []
    linear = kind(32, 48)
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    weight, bias, values = linear.weight, linear.bias, linear.weight.detach().clone()
    layer = rewrite(linear)
    assert layer is linear and isinstance(layer, BlockModule)
    assert layer.weight is weight and layer.bias is bias and torch.equal(weight, values)
    assert list(layer.state_dict()) == ["weight", "bias", "blocks", "block_indices"]
    layer(torch.randn(2, 32))
    assert calls == ["hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_restores_the_class_and_keys_and_keeps_the_trained_values(kind):
    layer = smt_linear(kind)
    shift(layer)
    block_indices, blocks = layer.block_indices, layer.blocks.detach().clone()
    linear = layer.to_plain()
    assert linear is layer and type(linear) is kind
    assert vars(linear).keys() == vars(kind(32, 48)).keys()
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert torch.equal(grid_of(kind).gather(linear.weight.detach(), block_indices), blocks)
    assert repr(linear) == repr(kind(32, 48))


def test_blocks_start_as_the_weights_of_their_places_in_the_master_dtype(kind):
    layer = smt_linear(kind, dtype=torch.bfloat16)
    assert layer.blocks.dtype == torch.float32 and layer.blocks.is_contiguous()
    assert torch.equal(layer.blocks.detach(), layer.grid.gather(layer.weight, layer.block_indices).float())


def test_write_back_changes_the_blocks_of_the_weight_and_nothing_else(kind):
    layer = smt_linear(kind)
    before = layer.weight.detach().clone()
    shift(layer)
    write_back([layer])
    mask = block_mask(layer.grid, BLOCK_INDICES)
    assert torch.equal(layer.weight[mask], (before + 1)[mask])
    assert torch.equal(layer.weight[~mask], before[~mask])


def test_write_back_rounds_to_the_weights_dtype(kind):
    layer = smt_linear(kind, dtype=torch.bfloat16)
    shift(layer, 0.001)
    write_back([layer])
    assert torch.equal(layer.grid.gather(layer.weight, layer.block_indices), layer.blocks.detach().bfloat16())


@pytest.mark.parametrize("move", [lambda layer: layer.to(torch.bfloat16), lambda layer: layer.double()])
def test_write_back_follows_the_weight_to_its_new_storage(move, kind):
    layer = smt_linear(kind)
    write_back([layer])
    move(layer)
    shift(layer)
    write_back([layer])
    assert torch.equal(layer.grid.gather(layer.weight, layer.block_indices), layer.blocks.detach())


def test_loading_a_state_dict_with_blocks_writes_them_into_the_weight(kind):
    source, layer = smt_linear(kind), smt_linear(kind)
    shift(source)
    state = source.state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer.blocks, source.blocks)
    assert torch.equal(layer.grid.gather(layer.weight, layer.block_indices), source.blocks.detach())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_state_dict_updates_the_blocks(assign, kind):
    dense, layer = kind(32, 48), smt_linear(kind)
    write_back([layer])
    layer.load_state_dict(dense.state_dict(), strict=False, assign=assign)
    assert torch.equal(layer.blocks.detach(), layer.grid.gather(dense.weight.detach(), layer.block_indices))
    write_back([layer])
    assert torch.equal(layer.weight, dense.weight)


def test_a_state_dict_of_other_blocks_is_refused_and_nothing_loaded(kind):
    layer, state = smt_linear(kind), smt_linear(kind).state_dict()
    before = tiny.weights(layer)
    state["block_indices"] = torch.tensor([[1, 1], [2, 0]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="holds other blocks than this model trains"):
        layer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_deep_copy_trains_apart_from_its_original(llama):
    convert_to_smt(llama, tiny.choose(llama))
    write_back(layer for _, layer in block_modules(llama))
    before = tiny.weights(llama)
    other = copy.deepcopy(llama)
    for _, layer in block_modules(other):
        shift(layer)
    write_back(layer for _, layer in block_modules(other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    for _, layer in block_modules(other):
        written = layer.grid.gather(layer.weight, layer.block_indices)
        assert torch.equal(written, layer.blocks.detach())


def test_the_old_weight_is_freed_once_the_weight_has_moved(kind):
    layer = smt_linear(kind)
    write_back([layer])
    old = torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage())
    layer.double()
    assert old.expired()


def test_pickling_stores_the_weight_once(kind, tmp_path):
    layer = smt_linear(kind)
    torch.save(layer, tmp_path / "before.pt")
    write_back([layer])
    torch.save(layer, tmp_path / "after.pt")
    assert (tmp_path / "after.pt").stat().st_size < (tmp_path / "before.pt").stat().st_size + 1024


def test_forward_is_that_of_the_dense_linear(kind):
    linear, x = kind(32, 48), torch.randn(2, 3, 32)
    expected = linear(x)
    assert torch.equal(rewrite(linear)(x), expected)


def test_evaluation_and_saving_between_forward_and_backward_change_nothing(kind):
    layer, x = smt_linear(kind, torch.bfloat16), torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.blocks.grad.clone(), x.grad.clone()
    layer.blocks.grad, x.grad = None, None
    y = layer(x)
    layer.eval()
    layer.state_dict()
    y.sum().backward()
    assert torch.equal(layer.blocks.grad, expected[0]) and torch.equal(x.grad, expected[1])


def test_a_change_without_a_trace_is_in_the_weight_before_evaluation(kind):
    layer = smt_linear(kind)
    layer.blocks.data += 1
    layer.eval()
    assert torch.equal(layer.grid.gather(layer.weight, layer.block_indices), layer.blocks)


def save(layer: BlockModule) -> None:
    layer.state_dict()


@pytest.mark.parametrize("look", [nn.Module.eval, save])
def test_changes_without_a_trace_are_in_every_forward_once_one_was_seen(look, kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    expected, own = layer(x), layer.blocks.detach().clone()
    # As a callback that averages blocks does around an evaluation.
    layer.blocks.data.copy_(own + 1)
    look(layer)
    assert not torch.equal(layer(x), expected)
    layer.blocks.data.copy_(own)
    layer.train()
    assert torch.equal(layer(x), expected)


def test_a_copy_made_before_its_blocks_were_written_computes_with_them(kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    shift(layer)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))


def test_a_copy_whose_blocks_have_changed_as_often_as_the_originals_sees_it(kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    for _ in range(3):
        shift(layer)
    write_back([layer])
    other = copy.deepcopy(layer)
    for _ in range(layer.blocks._version - other.blocks._version):
        shift(other, 2.0)
    assert torch.equal(other(x), dense(other)(x)) and not torch.equal(other(x), layer(x))


def dense(layer: BlockModule) -> nn.Module:
    """Return the plain twin of a layer."""
    return copy.deepcopy(layer).to_plain()


def test_blocks_that_stand_in_for_others_are_used_and_leave_no_trace(kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    expected, others = layer(x), (layer.blocks.detach() + 1).requires_grad_()
    found = torch.func.functional_call(layer, {"blocks": others}, x)
    found.square().sum().backward()
    assert torch.equal(layer(x), expected)
    shift(layer)
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y, found) and torch.equal(layer.blocks.grad, others.grad)


def test_a_layer_used_twice_sums_its_gradients(kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    (layer(x) + layer(2 * x)).sum().backward()
    twice = layer.blocks.grad.clone()
    layer.blocks.grad = None
    layer(3 * x).sum().backward()
    torch.testing.assert_close(twice, layer.blocks.grad, rtol=1e-6, atol=1e-6)


def test_a_trained_bias_gets_its_gradient_and_the_weight_none(kind):
    layer, x = smt_linear(kind), torch.randn(5, 32)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 5.0)) and layer.weight.grad is None


def test_the_representation_shows_the_blocks(kind):
    assert "in_features=32, out_features=48, bias=True, blocks=2 of 16x16 (grid 3x2)" in repr(smt_linear(kind))
