"""Experts in a list get their gradients together, and those that they would get anyway."""

import mixtures
import pytest
import tiny
import torch

from smt_trainer import convert_to_smt
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.listed_experts import arriving_together

CONFIG = {"target_modules": ["up", "down"], "budget": 60, "score": "random"}
# Of two tokens that the models have not seen in their batch, few experts are called.
BATCHES = [{"input_ids": torch.tensor([row]), "labels": torch.tensor([row])} for row in ([5, 9, 5, 9], [30, 4, 4, 30])]


@pytest.fixture(params=[None, False, True], ids=["kept", "checkpointed", "reentrant"])
def model(request):
    """Return a rewritten model, with each way of checkpointing."""
    model = mixtures.listed().double().train()
    convert_to_smt(model, tiny.choose(model, tiny.config(**CONFIG)))
    if request.param is not None:
        model.gradient_checkpointing_enable({"use_reentrant": request.param})
        model.enable_input_require_grads()
    return model


def gradients(model, batch):
    """Return the gradients of the blocks, in the order in which they came."""
    found = {}
    hooks = [
        linear.blocks.register_post_accumulate_grad_hook(
            lambda blocks, name=name: found.__setitem__(name, blocks.grad.clone())
        )
        for name, linear in block_modules(model)
        if linear.blocks.requires_grad
    ]
    model.zero_grad()
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return found


def test_the_router_does_not_decide_in_which_order_gradients_come(model):
    apart = [gradients(model, batch) for batch in BATCHES]
    assert list(apart[0]) != list(apart[1])
    with arriving_together(model):
        orders = [list(gradients(model, batch)) for batch in BATCHES]
    assert orders[0] == orders[1]
    assert set(orders[0]) == {name for name, _ in block_modules(model)}


def test_gradients_stay_the_same_and_are_zero_where_no_token_was_sent(model):
    for batch in BATCHES:
        expected = gradients(model, batch)
        with arriving_together(model):
            found = gradients(model, batch)
        for name, gradient in found.items():
            assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient)))
        assert 0 < len(expected) < len(found)


def test_a_call_without_any_trained_expert_reaches_all(model):
    chosen = {name for name, _ in block_modules(model)}
    kept = sorted(chosen - set(gradients(model, BATCHES[0])))
    assert kept
    for name, linear in block_modules(model):
        linear.blocks.requires_grad_(name in kept)
    with arriving_together(model):
        found = gradients(model, BATCHES[0])
    assert sorted(found) == kept and not any(gradient.any() for gradient in found.values())


def test_forward_is_as_before_and_nothing_is_left_behind(model):
    before = tiny.logits(model)
    with arriving_together(model):
        assert torch.equal(tiny.logits(model), before)
    assert not any(linear.alias is not None for _, linear in block_modules(model))
    assert not any(layer.mlp._forward_hooks or layer.mlp._forward_pre_hooks for layer in model.model.layers)
