"""What reads a weight with blocks beside its linear's own product is refused in the first step."""

import pytest
import tiny
import torch
from transformers import TrainerCallback

from smt_trainer import SMTError, select_tokens


class Penalised(tiny.SMTTrainer):
    """A penalty on a weight, which the linear's product does not see."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        weight = model.get_submodule("model.layers.1.self_attn.v_proj").weight
        return super().compute_loss(model, inputs, **kwargs) + 0.1 * weight.square().sum()


class OwnHead(tiny.SMTTrainer):
    """A loss that multiplies by the head's weight itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        logits = hidden @ model.lm_head.weight.t()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def is_frozen(model) -> bool:
    """Whether the dense weights are as training wants them, with no hook or gradient left."""
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith("blocks")]
    return not any(weight.requires_grad or weight.grad is not None or weight._backward_hooks for weight in weights)


def test_a_penalty_on_a_weight_is_refused_before_a_step_is_taken(tmp_path):
    model = tiny.llama()
    before = tiny.weights(model)
    run = tiny.smt_trainer(model, tmp_path, tiny.config(target_modules=["v_proj"]), kind=Penalised, max_grad_norm=1)
    with pytest.raises(SMTError, match=r"reads the weights of v_proj \(1\) outside .*exclude_modules=\['v_proj'\]"):
        run.train()
    assert run.state.global_step == 0 and is_frozen(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_penalty_on_a_weight_without_blocks_changes_nothing(tmp_path):
    plain, penalised = (
        tiny.smt_trainer(tiny.llama(), tmp_path / kind.__name__, tiny.config(target_modules=["q_proj"]), kind=kind)
        for kind in (tiny.SMTTrainer, Penalised)
    )
    for run in (plain, penalised):
        run.train()
        assert is_frozen(run.model)
    tiny.assert_same(tiny.weights(plain.model), tiny.weights(penalised.model))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_of_a_head_that_the_loss_reads_itself_are_refused(tied, tmp_path):
    model = tiny.llama(tie_word_embeddings=tied)
    selection = select_tokens(model, [3, 5])
    run = tiny.smt_trainer(model, tmp_path, tiny.config(selection=selection), kind=OwnHead)
    if tied:
        with pytest.raises(SMTError, match=r"reads the weights of embed_tokens \(1\).*modules_to_save="):
            run.train()
    else:
        run.train()
        assert run.state.global_step == 4 and is_frozen(model)


def test_gradient_checkpointing_and_accumulation_are_no_readers(tmp_path):
    run = tiny.smt_trainer(
        tiny.llama(), tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=2
    )
    run.train()
    assert run.state.global_step == 2 and is_frozen(run.model)


class PenaltyOnBlocks(tiny.SMTTrainer):
    """A penalty on what is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        penalty = sum(one.square().sum() for name, one in model.named_parameters() if name.endswith(".blocks"))
        return super().compute_loss(model, inputs, **kwargs) + 0.1 * penalty


def test_a_penalty_on_the_blocks_is_no_reader(tmp_path):
    run = tiny.smt_trainer(
        tiny.llama(), tmp_path, tiny.config(target_modules=["v_proj"], score="random"), kind=PenaltyOnBlocks
    )
    run.train()
    assert run.state.global_step == 4 and is_frozen(run.model)


def test_callbacks_see_the_weights_frozen_and_every_trained_parameter_with_a_gradient(tmp_path):
    seen = []

    class Logs(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append({name for name, one in model.named_parameters() if one.requires_grad})

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
            assert all(one.grad is not None for one in trained.values())
            seen.append(set(trained))

    run = tiny.smt_trainer(tiny.llama(), tmp_path, max_steps=2)
    run.add_callback(Logs())
    run.train()
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    assert all(name.endswith("blocks") for name in seen[0])


def test_a_weight_with_a_gradient_hook_is_trained_and_named(tmp_path, warnings):
    model = tiny.llama()
    model.get_submodule("model.layers.1.self_attn.v_proj").weight.register_hook(lambda gradient: gradient * 2)
    fields = {"target_modules": ["v_proj"], "scope": "per_module", "budget": 2, "score": "random"}
    run = tiny.smt_trainer(model, tmp_path, tiny.config(**fields))
    run.train()
    assert run.state.global_step == 4
    assert any("1 weights with gradient hooks, such as that of `model.layers.1" in line for line in warnings())


class AsksForGradients(tiny.SMTTrainer):
    """Computes the gradient of what is trained by itself, as methods that balance several losses do."""

    allow_unused = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=self.allow_unused)
        return loss


def test_asking_for_gradients_of_weights_that_hold_blocks_is_explained(tmp_path):
    given = {"smt_config": tiny.config(score="random"), "kind": AsksForGradients}
    with pytest.raises(SMTError, match=r"In the first step.*`\.blocks`.*allow_unused=True"):
        tiny.smt_trainer(tiny.llama(), tmp_path / "refused", **given).train()
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path / "run", **given)
    trainer.allow_unused = True
    trainer.train()
    assert trainer.state.global_step == 4
