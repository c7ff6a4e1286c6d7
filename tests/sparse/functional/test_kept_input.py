"""What the sparse linear keeps of its input: nothing that autograd does not keep anyway."""

import pytest
import tiny
import torch
import transformers
from mixtures import mixture
from packaging.version import Version
from torch import nn
from torch.autograd.graph import save_on_cpu

from smt_trainer import convert_to_smt
from smt_trainer.sparse import functional
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.functional.kept_input import KeptInput, find_origin

IS_OLD = Version(transformers.__version__) < Version("5.23")
# Model -> linear -> whether its input can be recomputed from what autograd keeps anyway. Layer 1, since something
# below it requires a gradient.
LLAMA = {"self_attn.v_proj": True, "self_attn.o_proj": False, "mlp.up_proj": True, "mlp.down_proj": True}
CASES = {
    "llama": (tiny.llama, LLAMA),
    "gemma": (lambda: tiny.build("GemmaForCausalLM", head_dim=16, num_key_value_heads=2), LLAMA),
    "gpt2": (tiny.gpt2, {"attn.c_attn": True, "attn.c_proj": False, "mlp.c_fc": True, "mlp.c_proj": True}),
}


def inputs_of(model, endings, run):
    """Return name -> input of the linears of layer 1 with these endings, and the origin that the linear would find."""
    found = {}

    def see(name):
        return lambda _, args: found.__setitem__(name, (args[0], find_origin(args[0])))

    handles = [
        module.register_forward_pre_hook(see(ending))
        for name, module in model.named_modules()
        for ending in endings
        if name.endswith(f"1.{ending}")
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_an_input_is_recomputed_bit_for_bit(name, dtype):
    build, linears = CASES[name]
    model = build().requires_grad_(False).train()
    model.enable_input_require_grads()
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = inputs_of(model, linears, lambda: model(**tiny.batch(2)))
    else:
        model.to(dtype)
        found = inputs_of(model, linears, lambda: model(**tiny.batch(2)))
    for linear, expected in linears.items():
        x, origin = found[linear]
        # LayerNorm in half precision keeps a rounded mean.
        expected = expected and not (linear in ("attn.c_attn", "mlp.c_fc") and dtype == torch.bfloat16)
        assert (origin is not None) == expected, linear
        if origin:
            assert torch.equal(origin.columns(0, x.shape[-1]), x.flatten(0, -2))
            assert torch.equal(origin.columns(3, 5), x.flatten(0, -2)[:, 3:8])


def kept(node):
    """Return address -> bytes of the storages that an autograd graph keeps."""
    seen, found, stack = set(), {}, [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):
            continue
        seen.add(node)
        tensors = list(getattr(node, "saved_tensors", ()))
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            tensors += value if isinstance(value, (list, tuple)) else [value]
        for tensor in tensors:
            if torch.is_tensor(tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        stack += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["qkv", "all-linear"])
def test_a_model_with_blocks_keeps_what_the_frozen_one_does(llama, target, dtype):
    llama = llama.to(dtype).train()
    batch = tiny.batch(2)

    def activations(model):
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        found = kept(model(**batch).loss.grad_fn)
        return sum(size for address, size in found.items() if address not in own)

    llama.requires_grad_(False).enable_input_require_grads()
    floor = activations(llama)
    convert_to_smt(
        llama, tiny.choose(llama, tiny.config(target_modules=target, scope="per_module", budget=2, score="random"))
    )
    assert len(list(block_modules(llama))) == (6 if target == "qkv" else 14)
    assert activations(llama) == floor


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_kept_input_bit_for_bit(name, monkeypatch):
    build, linears = CASES[name]
    targets = [linear.rpartition(".")[2] for linear in linears]
    smt_config = tiny.config(target_modules=targets, scope="per_module", budget=3, score="random")

    def gradients():
        model = build().train()
        convert_to_smt(model, tiny.choose(model, smt_config))
        torch.manual_seed(0)
        model(**tiny.batch(2)).loss.backward()
        return {name: layer.blocks.grad for name, layer in block_modules(model)}

    ours = gradients()
    monkeypatch.setattr(functional.linear, "find_origin", lambda x: None)
    by_reference = gradients()
    assert ours.keys() == by_reference.keys() and all(ours[name].any() for name in ours)
    assert all(torch.equal(ours[name], by_reference[name]) for name in ours)


def product(x):
    return x * 2 * nn.Parameter(torch.randn(8), requires_grad=False)


def masked(x):
    """A product in which something was changed without a gradient, so that the graph does not show it."""
    with torch.no_grad():
        x[..., :2] = 0
    return x


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.detach() * 2,
        lambda x: nn.functional.gelu(x),
        lambda x: (x[:, :1] * x).transpose(0, 1),
        lambda x: x[:1] * x,
        lambda x: product(x).add_(1),
        lambda x: masked(product(x)),
        lambda x: product(x)[0],
        lambda x: product(x).view(-1, 4)[torch.tensor([0, 3])],
    ],
    ids=[
        "a leaf",
        "nothing before it",
        "another function",
        "a view",
        "a broadcast over tokens",
        "changed in place",
        "changed in place without a gradient",
        "one token",
        "some heads",
    ],
)
def test_another_input_is_kept_itself(make):
    assert find_origin(make(torch.randn(4, 8, requires_grad=True))) is None


def test_under_hooks_the_input_is_kept_itself():
    x = torch.randn(4, 8, requires_grad=True)
    assert isinstance(find_origin(x * x.exp()), KeptInput)
    with save_on_cpu():
        assert find_origin(x * x.exp()) is None


def test_parameters_that_zero_3_empties_are_left_alone():
    x, weight = torch.randn(4, 8, requires_grad=True), nn.Parameter(torch.randn(8), requires_grad=False)
    assert find_origin(x * x.exp() * weight) is not None
    weight.ds_id = 0
    assert find_origin(x * x.exp() * weight) is None


def test_torch_still_has_what_the_trace_reads():
    """If one of these were missing, inputs would silently be kept again."""
    x = torch.randn(4, 8, requires_grad=True)
    node = (x * x.exp()).bfloat16().grad_fn
    assert node._input_metadata[0].dtype == torch.bfloat16
    assert type(node).__name__ == "ToCopyBackward0"
    assert type(node.next_functions[0][0]).__name__ == "MulBackward0"
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("grouped_mm", marks=pytest.mark.skipif(IS_OLD, reason="selects twice"))]
)
def test_experts_keep_what_the_frozen_model_keeps(implementation):
    model = mixture("Qwen3MoeForCausalLM", implementation).requires_grad_(False)
    model.enable_input_require_grads()
    batch = tiny.batch(2)

    def activations():
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        found = kept(model(**batch).loss.grad_fn)
        return sum(size for address, size in found.items() if address not in own)

    floor = activations()
    convert_to_smt(model, tiny.choose(model, tiny.config(target_modules="experts", budget=100, score="random")))
    assert activations() == floor


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_of_experts_are_those_of_a_kept_input_bit_for_bit(implementation, monkeypatch):
    smt_config = tiny.config(target_modules="experts", budget=100, score="random")

    def gradients():
        model = mixture("Qwen3MoeForCausalLM", implementation)
        convert_to_smt(model, tiny.choose(model, smt_config))
        model(**tiny.batch(2)).loss.backward()
        return {name: linear.blocks.grad for name, linear in block_modules(model)}

    ours = gradients()
    monkeypatch.setattr(functional.experts, "find_origin", lambda x: None)
    tiny.assert_same(ours, gradients())
