"""Convolutions that train chosen blocks: everything but the gradients of the other weights is as in a dense one."""

import copy

import images
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import train_only
from strategies import convolutions
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smt_trainer import SMTError, convert_to_smt, merge_and_unload
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.conv import SMTConv, SMTConv1d, SMTConv2d, SMTConv3d, block_conv_of
from smt_trainer.sparse.write_back import write_back

CUTS = {"rows": {}, "columns": {"granularity": "column"}, "blocks": {"granularity": "block", "block_size": (4, 3)}}

DIVISIBLE_BY_4 = r".*(layer\.\d\.convolution|conv[13])"


def rewrite(conv: nn.Module, grid: BlockGrid, block_indices: torch.Tensor, dtype=torch.float64) -> SMTConv:
    return block_conv_of(conv).from_plain(conv, grid, block_indices, dtype)


def divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]


@st.composite
def some_blocks(draw, conv: nn.Module) -> tuple[BlockGrid, torch.Tensor]:
    """Draw rows, columns or blocks of a convolution, and some of them in any order."""
    rows = target_grids({"conv": conv}, images.config())["conv"]
    edges = [draw(st.sampled_from(divisors(size))) for size in rows.weight_shape]
    shape = draw(st.sampled_from([rows.block_shape, rows.column_shape, tuple(edges)]))
    grid = BlockGrid(*rows.weight_shape, *shape, kernel=rows.kernel, groups=rows.groups)
    chosen = draw(st.lists(st.integers(0, grid.num_blocks - 1), min_size=1, unique=True))
    return grid, torch.stack(torch.unravel_index(torch.tensor(chosen), grid.shape), dim=1)


@given(st.data())
def test_forward_and_all_gradients_are_those_of_the_dense_convolution(data):
    conv, x = data.draw(convolutions())
    grid, block_indices = data.draw(some_blocks(conv))
    x.requires_grad_()
    y = conv(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dw, dx, conv.weight.grad, x.grad = conv.weight.grad, x.grad, None, None
    db = None if conv.bias is None else conv.bias.grad.clone()
    conv.zero_grad()
    layer = rewrite(conv, grid, block_indices)
    out = layer(x)
    assert torch.equal(out, y) and out.stride() == y.stride()
    out.backward(dy)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.blocks.grad, grid.gather(dw, layer.block_indices))
    torch.testing.assert_close(x.grad, dx)
    if db is not None:
        torch.testing.assert_close(layer.bias.grad, db)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("fields", CUTS.values(), ids=CUTS)
def test_gradients_are_those_of_finite_differences(groups, fields):
    conv = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups, padding_mode="reflect").double()
    grid = target_grids({"conv": conv}, images.config(**fields | {"block_size": fields.get("block_size", "auto")}))
    picked = torch.randperm(grid["conv"].num_blocks)[: max(1, grid["conv"].num_blocks // 3)]
    layer = rewrite(conv, grid["conv"], torch.stack(torch.unravel_index(picked, grid["conv"].shape), dim=1))

    def of(x, bias, blocks):
        # Forward reads the weight, so finite differences have to change it.
        layer.grid.scatter_(layer.weight.data, layer.block_indices, blocks.detach())
        parts = {"bias": bias, "blocks": blocks}
        return torch.func.functional_call(layer, parts, (x,))

    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    leaves = [part.detach().clone().requires_grad_() for part in (layer.bias, layer.blocks)]
    assert torch.autograd.gradcheck(of, (x, *leaves))


@pytest.mark.parametrize("make", [images.resnet, images.ResNeXt])
@pytest.mark.parametrize(
    "fields",
    [{}, {"granularity": "column"}, {"granularity": "block", "block_size": 4, "target_modules": DIVISIBLE_BY_4}],
    ids=CUTS,
)
def test_a_step_is_that_of_dense_training_with_the_gradient_masked(make, fields):
    model = make().double().train()
    selection = tiny.choose(model, images.config(score="random", modules_to_save=[], **fields))
    masks = {}
    for name, grid in selection.grids.items():
        mask = torch.zeros(grid.stored_shape, dtype=torch.bool)
        if name in selection.block_indices:
            indices = torch.from_numpy(selection.block_indices[name])
            grid.scatter_(mask, indices, torch.ones(len(indices), *grid.block_shape, dtype=torch.bool))
        masks[name] = mask
    dense = train_only(copy.deepcopy(model), masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = images.batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    convert_to_smt(model, selection)
    for each in (model, dense):
        tiny.step(each, **inputs)
    trained = merge_and_unload(model).state_dict()
    torch.testing.assert_close(trained, dense.state_dict())
    for name, mask in masks.items():
        assert torch.equal(trained[f"{name}.weight"][~mask], before[f"{name}.weight"][~mask])
        assert mask.any() == (not torch.equal(trained[f"{name}.weight"], before[f"{name}.weight"]))


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (nn.Conv1d(4, 8, 3), SMTConv1d),
        (nn.Conv2d(4, 8, 3), SMTConv2d),
        (nn.Conv3d(4, 8, 3), SMTConv3d),
    ],
)
def test_rewriting_keeps_the_module_and_undoing_restores_it(conv, kind):
    text, keys, weight = repr(conv), list(conv.state_dict()), conv.weight
    attributes = vars(conv).keys() - set()
    layer = rewrite(conv, target_grids({"c": conv}, images.config())["c"], torch.tensor([[5, 0], [2, 0]]))
    assert layer is conv and type(layer) is kind and layer.weight is weight
    assert "blocks=2 of 1x" in repr(layer) and "kernel_size" in repr(layer)
    with torch.no_grad():
        layer.blocks += 1
    written = layer.blocks.detach().clone()
    rows = layer.block_indices[:, 0].tolist()
    layer.to_plain()
    assert (repr(conv), list(conv.state_dict()), type(conv)) == (text, keys, type(conv)) and conv.weight is weight
    assert vars(conv).keys() == attributes
    torch.testing.assert_close(conv.weight.detach()[rows].flatten(1), written.squeeze(1).float(), rtol=0, atol=0)


def test_masters_stay_in_float32_and_forward_uses_their_rounded_values():
    conv = nn.Conv2d(4, 8, 3).bfloat16()
    grid = target_grids({"c": conv}, images.config())["c"]
    layer = rewrite(conv, grid, torch.tensor([[1, 0]]), torch.float32)
    with torch.no_grad():
        layer.blocks += 2**-12
    layer(torch.randn(1, 4, 5, 5).bfloat16()).sum().backward()
    assert layer.blocks.grad.dtype == torch.float32
    assert torch.equal(grid.gather(layer.weight, layer.block_indices), layer.blocks.detach().bfloat16())


def test_autocast_gives_what_it_gives_the_dense_convolution():
    conv, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6, requires_grad=True)
    dense = copy.deepcopy(conv)
    layer = rewrite(
        conv, target_grids({"c": conv}, images.config())["c"], torch.tensor([[1, 0], [6, 0]]), torch.float32
    )
    with torch.autocast("cpu", torch.bfloat16):
        outputs = dense(x), layer(x)
    assert torch.equal(*outputs) and outputs[1].dtype == torch.bfloat16
    for output in outputs:
        output.float().square().sum().backward()
    rows = layer.block_indices[:, 0].tolist()
    expected = dense.weight.grad[rows].flatten(1)
    torch.testing.assert_close(
        layer.blocks.grad.squeeze(1), expected, rtol=2**-6, atol=expected.abs().max().item() / 64
    )


def test_channels_last_weights_are_written_and_computed_alike():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    layer = rewrite(conv, target_grids({"c": conv}, images.config())["c"], torch.tensor([[4, 0]]), torch.float32)
    with torch.no_grad():
        layer.blocks += 1
    write_back([layer])
    plain = nn.Conv2d(8, 8, 3)
    plain.load_state_dict({"weight": layer.weight.contiguous(), "bias": layer.bias})
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x), plain(x))
    assert torch.equal(layer.weight[4].flatten(), layer.blocks.detach().flatten())


def test_backward_forms_the_gradient_of_the_chosen_channels_only():
    def flops(rows: int) -> int:
        conv = nn.Conv2d(16, 32, 3)
        index = torch.tensor([[row, 0] for row in range(rows)])
        layer = rewrite(conv, target_grids({"c": conv}, images.config())["c"], index, torch.float32)
        y = layer(torch.randn(1, 16, 8, 8))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    assert flops(2) * 8 == flops(16) > 0


def test_a_convolution_keeps_only_its_input_for_backward():
    conv, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6, requires_grad=True)
    layer = rewrite(conv, target_grids({"c": conv}, images.config())["c"], torch.tensor([[1, 0]]), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    own = {layer.weight.data_ptr(), layer.positions.data_ptr()}
    assert [tensor.data_ptr() for tensor in kept if tensor.data_ptr() not in own] == [x.data_ptr()]


def test_a_compiled_layer_trains_the_same():
    conv, x = nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 6, 6)
    layer = rewrite(conv, target_grids({"c": conv}, images.config())["c"], torch.tensor([[1, 0], [2, 0], [7, 0]]))
    layer.double()
    expected = layer(x.double())
    expected.sum().backward()
    gradient, layer.blocks.grad = layer.blocks.grad, None
    compiled = torch.compile(layer, backend="aot_eager")
    y = compiled(x.double())
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.blocks.grad, gradient)


def test_a_model_with_another_convolution_is_refused():
    model = images.ResNeXt()
    selection = tiny.choose(model, images.config(score="random"))
    model.blocks[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    with pytest.raises(SMTError, match=r"`blocks.0.conv2` lie in a convolution of 2 groups with a weight of 8x4x3x3"):
        convert_to_smt(model, selection)
    assert not list(block_modules(model)) and find_targets(model, images.config())
