"""Changes that others make to trained values, after or outside of an optimizer's step, count in the next forward."""

from collections.abc import Callable

import pytest
import tiny
import torch
from transformers import TrainerCallback

from smt_trainer import SMTConfig, SMTTrainer, merge_and_unload
from smt_trainer.training.write_back import ChangesWriteBack

NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"]


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Clamp(TrainerCallback):
    """Keeps trained values small, without a trace."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in trained_parameters(model):
            parameter.data.clamp_(-0.01, 0.01)


class Halve(TrainerCallback):
    """Halves trained values, by an operation."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in trained_parameters(model):
            parameter.mul_(0.5)


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, as is usual, and pulls the values back after its step, without a trace."""

    def __init__(self, params, lr):
        self.inner = torch.optim.SGD(params, lr=lr)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults
        self.load_state_dict, self.zero_grad = self.inner.load_state_dict, self.inner.zero_grad
        self.state_dict = self.inner.state_dict
        self.slow = [parameter.data.clone() for group in self.param_groups for parameter in group["params"]]

    def step(self, closure=None):
        self.inner.step()
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(parameter.data, 0.5)
            parameter.data.copy_(slow)


class Perturbs:
    """Trainer mixin: changes trained values before each forward, without a trace."""

    def training_step(self, *args, **kwargs):
        for parameter in trained_parameters(self.model):
            parameter.data.mul_(0.9)
        return super().training_step(*args, **kwargs)


class PerturbingTrainer(Perturbs, tiny.RecordingTrainer):
    pass


class PerturbingSMTTrainer(Perturbs, tiny.RecordingSMTTrainer):
    pass


CLAMP, LOOKAHEAD = {"callbacks": [Clamp()]}, {"optimizer_cls_and_kwargs": (Lookahead, {"lr": 0.1})}
USUAL = tiny.RecordingTrainer, tiny.RecordingSMTTrainer
PERTURBING = PerturbingTrainer, PerturbingSMTTrainer


def uncompiled(model):
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


CASES: list[tuple[tuple, Callable, dict]] = [
    (USUAL, uncompiled, CLAMP),
    (USUAL, uncompiled, LOOKAHEAD),
    (USUAL, compiled_in_place, {"callbacks": [Halve()]}),
    (USUAL, compiled_in_place, CLAMP),
    (PERTURBING, uncompiled, {}),
]


@pytest.mark.parametrize(("kinds", "prepare", "given"), CASES)
def test_a_run_equals_one_of_dense_weights(kinds, prepare, given, tmp_path):
    dense = tiny.llama().requires_grad_(False)
    for name in NAMES:
        dense.get_submodule(name).weight.requires_grad_(True)
    selection = tiny.every_block(tiny.llama(), NAMES)

    def train(kind, model, **fields):
        arguments = tiny.arguments(
            tmp_path / kind.__name__, optim="sgd", learning_rate=0.1, gradient_accumulation_steps=2
        )
        trainer = kind(model=prepare(model), args=arguments, train_dataset=tiny.examples(), **given, **fields)
        trainer.train()
        return trainer

    stock = train(kinds[0], dense)
    ours = train(kinds[1], tiny.llama(), smt_config=SMTConfig(selection=selection))
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)
    model = merge_and_unload(ours.model)
    for name in NAMES:
        torch.testing.assert_close(model.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_nothing_is_compared_if_nobody_could_have_changed_it(tmp_path, monkeypatch):
    trainer = SMTTrainer(
        tiny.llama(), tiny.arguments(tmp_path), train_dataset=tiny.examples(), smt_config=tiny.config()
    )
    (ours,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, ChangesWriteBack))
    seen = []
    monkeypatch.setattr(ours, "catch_up", lambda: seen.append(len(ours.linears)))
    trainer.train()
    assert not any(seen)
    trainer.add_callback(Clamp())
    trainer.train()
    assert seen[-1] > 0 and not ours.linears
