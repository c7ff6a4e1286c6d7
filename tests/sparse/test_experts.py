"""Training the blocks of experts, whichever way the model writes their products."""

import copy

import pytest
import tiny
import torch
from mixtures import CASES, IMPLEMENTATIONS, mixture
from reference import block_mask

from smt_trainer import SMTConfig
from smt_trainer.model.targets import find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.scores.preserved import frozen
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.convert import convert_to_smt, merge_and_unload

SHAPES = {
    "blocks": {"block_size": 16},
    "rows": {"granularity": "row", "block_size": "auto"},
    "columns": {"granularity": "column", "block_size": "auto"},
}


def chosen(model, budget=100, **fields):
    return tiny.choose(model, SMTConfig(**{"target_modules": "experts", "score": "random", "budget": budget} | fields))


def gradients_of_experts(model, batch):
    """Return the gradient of each expert's matrix in dense training."""
    dense = copy.deepcopy(model)
    dense.zero_grad()
    loss = dense(**batch).loss
    loss.backward()
    targets = find_targets(dense, SMTConfig(target_modules="experts"))
    return loss, {name: matrix.stack.grad[matrix.index] for name, matrix in targets.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_the_blocks_get_the_gradient_of_dense_training(architecture, implementation, shape):
    # Three tokens of two experts each leave at least two of eight without any.
    model, batch = mixture(architecture, implementation), tiny.batch(1, length=3)
    expected_loss, dense = gradients_of_experts(model, batch)
    convert_to_smt(model, chosen(model, **SHAPES[shape]))
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected_loss)
    own = dict(block_modules(model))
    assert any(not dense[name].any() for name in own)
    for name, linear in own.items():
        wanted = linear.grid.gather(dense[name], linear.block_indices)
        torch.testing.assert_close(linear.blocks.grad, wanted.to(linear.blocks.dtype))
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith(".blocks")}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_come_in_an_order_that_the_router_does_not_decide(implementation):
    """ZeRO-2 adds up the gradients of all ranks in the order in which they come."""
    model = mixture(implementation=implementation)
    convert_to_smt(model, chosen(model, 8, block_size=16))
    order = []
    for name, linear in block_modules(model):
        linear.blocks.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    orders = set()
    for seed in range(8):
        order.clear()
        model(**tiny.batch(1, length=2, seed=seed)).loss.backward()
        orders.add(tuple(order))
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(name for name, _ in block_modules(model))


@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_steps_equal_dense_training_with_the_gradient_masked(architecture, implementation):
    model = mixture(architecture, implementation)
    selection, before = (
        chosen(model, block_size=16, master_dtype=str(model.dtype).removeprefix("torch.")),
        tiny.weights(model),
    )
    dense = copy.deepcopy(model).requires_grad_(False)
    masks = {}
    for name, matrix in find_targets(dense, SMTConfig(target_modules="experts")).items():
        mask = masks.setdefault(id(matrix.stack), torch.zeros_like(matrix.stack, dtype=torch.bool))
        if name in selection.block_indices:
            indices = torch.from_numpy(selection.block_indices[name])
            mask[matrix.index] = block_mask(selection.grids[name], indices)
    stacks = [parameter for parameter in dense.parameters() if id(parameter) in masks]
    convert_to_smt(model, selection)
    # Adam goes on moving an expert that gets no token.
    optimizers = [
        torch.optim.Adam(own, lr=0.01) for own in ([p for p in model.parameters() if p.requires_grad], stacks)
    ]
    for stack in stacks:
        stack.requires_grad_(True)
    for seed in range(3):
        for trained, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            trained(**tiny.batch(1, seed=seed)).loss.backward()
            for stack in stacks if trained is dense else ():
                stack.grad.mul_(masks[id(stack)])
            optimizer.step()
    merge_and_unload(model)
    after = dict(model.state_dict())
    assert after.keys() == before.keys()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-4, atol=1e-6)
        unselected = ~masks[id(parameter)] if id(parameter) in masks else torch.ones_like(parameter, dtype=torch.bool)
        tiny.assert_same(after[name][unselected], before[name][unselected])


@pytest.mark.parametrize("score", ["grad_l1", "grad_l2", "grad_signed", "grad_abs", "taylor"])
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_scores_are_those_of_the_dense_gradient(architecture, implementation, score):
    model, batch = mixture(architecture, implementation), tiny.batch(2)
    _, dense = gradients_of_experts(model, batch)
    config = tiny.config(target_modules="experts", score=score)
    targets = find_targets(model, config)
    scorer = make_scorer(targets, target_grids(targets, config), config)
    before = tiny.weights(model)
    with frozen(model), scorer.attached():
        model(**batch).loss.backward()
    of_block = {
        "grad_l1": lambda g, w: g.abs().mean((2, 3)),
        "grad_l2": lambda g, w: g.square().sum((2, 3)).sqrt(),
        "grad_signed": lambda g, w: g.mean((2, 3)).abs(),
        "grad_abs": lambda g, w: g.abs().mean((2, 3)),
        "taylor": lambda g, w: (g * w).sum((2, 3)).abs(),
    }[score]
    scores = scorer.scores()
    for name, matrix in targets.items():
        grid = scorer.grids[name]
        gradient, weight = grid.split(dense[name]), grid.split(matrix.weight.detach())
        wanted = of_block(gradient, weight).float()
        # Scores are summed in float32.
        torch.testing.assert_close(scores[name], wanted, rtol=1e-3, atol=1e-5 * float(wanted.max() + 1e-6))
    tiny.assert_same(tiny.weights(model), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_score_of_the_inputs_counts_the_tokens_that_an_expert_got():
    model, inputs = mixture("Qwen3MoeForCausalLM", "eager"), {}
    config = tiny.config(target_modules=["gate_up_proj"], score="activation")
    targets = find_targets(model, config)
    scorer = make_scorer(targets, target_grids(targets, config), config)

    def note(experts, args):
        hidden, routes = args[0], args[1]
        inputs[id(experts)] = [hidden[(routes == expert).any(1)] for expert in range(8)]

    for module in {matrix.experts for matrix in targets.values()}:
        module.register_forward_pre_hook(note)
    with frozen(model), scorer.attached():
        model(**tiny.batch(2))
    for name, matrix in targets.items():
        own = inputs[id(matrix.experts)][matrix.index]
        wanted = own.float().square().sum(0).unflatten(0, (-1, 16)).sum(1).sqrt()
        torch.testing.assert_close(scorer.scores()[name], wanted.expand(4, -1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_changes_no_gradient(implementation, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = mixture("Qwen3MoeForCausalLM", implementation)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        convert_to_smt(model, chosen(model, block_size=16))
        model(**tiny.batch(2)).loss.backward()
        gradients.append([linear.blocks.grad for _, linear in block_modules(model)])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_gives_gradients_in_the_dtype_of_the_masters(implementation):
    model, batch = mixture("Qwen3MoeForCausalLM", implementation).float(), tiny.batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, dense = gradients_of_experts(model, batch)
        convert_to_smt(model, chosen(model, block_size=16))
        loss = model(**batch).loss
        loss.backward()
    assert torch.equal(loss, expected_loss)
    for name, linear in block_modules(model):
        assert linear.blocks.grad.dtype is torch.float32
        wanted, largest = linear.grid.gather(dense[name], linear.block_indices), float(dense[name].abs().max())
        # Eight bits of mantissa.
        torch.testing.assert_close(linear.blocks.grad, wanted, rtol=2**-7, atol=2**-7 * largest)


def test_a_copy_of_the_model_is_trained_by_itself():
    model = mixture("Qwen3MoeForCausalLM", "eager")
    convert_to_smt(model, chosen(model, block_size=16))
    copied, before = copy.deepcopy(model), tiny.weights(model)
    tiny.step(copied, **tiny.batch(2))
    assert all(parameter.grad is None for parameter in model.parameters())
    tiny.assert_same(tiny.weights(model), before)
    changed = [name for name, tensor in tiny.weights(copied).items() if not torch.equal(tensor, before[name])]
    assert any(name.endswith("gate_up_proj") for name in changed) and any(name.endswith(".blocks") for name in changed)


def test_a_plain_state_dict_brings_its_blocks():
    model, other = mixture(), mixture()
    tiny.disturb(other)
    convert_to_smt(model, chosen(model, block_size=16))
    model.load_state_dict(other.state_dict(), strict=False)
    merge_and_unload(model)
    tiny.assert_same(tiny.weights(model), tiny.weights(other))


def test_unloading_leaves_no_trace():
    model = mixture("Qwen3MoeForCausalLM", "eager")
    plain = mixture("Qwen3MoeForCausalLM", "eager")
    convert_to_smt(model, chosen(model, block_size=16))
    assert "smt_experts" in str(model)
    merge_and_unload(model)
    assert str(model) == str(plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert tiny.weights(model).keys() == tiny.weights(plain).keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
