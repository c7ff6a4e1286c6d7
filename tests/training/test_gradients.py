"""Blocks without a gradient are noticed in the first step, where no warm-up noticed them before."""

import pytest
import tiny
import torch
from out_of_reach import OutOfReach

from smt_trainer import SMTError
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import is_smt_model


def config(*targets, **fields):
    defaults = {"target_modules": list(targets), "score": "random", "budget": 1, "scope": "per_module"}
    return tiny.config(**defaults | fields)


def trainer(model, folder, smt_config, **overrides):
    return tiny.smt_trainer(model, folder, smt_config, kind=tiny.SMTTrainer, **overrides)


def no_hooks(model) -> bool:
    return not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["called", "read"], r"2 of 4 linears .* the model reads read \(2\) without calling them"),
        (["called", "unused"], r"2 of 4 linears .* nothing uses the output of unused \(2\)"),
    ],
)
@pytest.mark.parametrize("score", ["random", "magnitude", "a selection"])
def test_the_first_step_is_refused_and_nothing_is_lost(targets, message, score, tmp_path):
    model = OutOfReach()
    fields = {"score": score} if score != "a selection" else {"selection": tiny.choose(model, config(*targets))}
    before = tiny.weights(model)
    run = trainer(model, tmp_path, config(*targets, **fields), gradient_accumulation_steps=2)
    with pytest.raises(SMTError, match=rf"{message}.*No optimizer step was taken.*exclude_modules=\['"):
        run.train()
    assert run.state.global_step == 0 and no_hooks(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_unused_linear_is_refused_after_a_warm_up_that_runs_no_backward(tmp_path):
    with pytest.raises(SMTError, match=r"nothing uses the output of unused \(2\)"):
        trainer(OutOfReach(), tmp_path, config("called", "unused", score="activation")).train()


def test_what_had_no_turn_in_the_first_step_is_waited_for_and_named_at_the_end(tmp_path, warnings):
    model = OutOfReach()
    run = trainer(model, tmp_path, config("called", "experts.0", "experts.1", "experts.2", "tower.0"))
    run.train()
    assert run.state.global_step == 4 and no_hooks(model)
    (line,) = [line for line in warnings() if "No gradient reached" in line]
    assert "of experts (2), tower (1) in 4 steps" in line


def test_a_second_run_is_not_watched_again(tmp_path, warnings):
    run = trainer(OutOfReach(), tmp_path, config("called", "tower.0"))
    run.train()
    run.train()
    assert is_smt_model(run.model) and len([line for line in warnings() if "No gradient reached" in line]) == 1


def test_an_evaluation_before_the_first_step_tells_nothing(tmp_path):
    class Evaluated(OutOfReach):
        def forward(self, input_ids, labels=None):
            if not self.training:
                self.tower(self.embed(input_ids))
            return super().forward(input_ids, labels)

    run = tiny.SMTTrainer(
        Evaluated(),
        tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(4),
        smt_config=config("called", "tower.0"),
    )
    run.train()
    assert run.state.global_step == 4


def test_a_refused_run_trains_without_what_it_names(tmp_path):
    run = trainer(OutOfReach(), tmp_path, config("called", "read", exclude_modules=["read"]))
    run.train()
    assert all(linear.blocks.shape[0] == 1 for _, linear in block_modules(run.model))


MODELS = {
    "Llama": (tiny.llama, {}),
    "reentrant": (
        tiny.llama,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "compiled": (tiny.llama, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "layers that run three times": (lambda: tiny.build("AlbertForMaskedLM", num_hidden_layers=3), {}),
    "GPT-2": (tiny.gpt2, {}),
}


@pytest.mark.parametrize(("make", "overrides"), MODELS.values(), ids=MODELS)
def test_a_run_in_reach_is_not_disturbed(make, overrides, tmp_path, warnings):
    model = make()
    run = trainer(model, tmp_path, tiny.config(score="random"), **overrides)
    run.train()
    assert run.state.global_step == 4 and no_hooks(model)
    assert not any("No gradient" in line for line in warnings())


class ByName(tiny.SMTTrainer):
    """Picks the parameters of its optimizer by their names."""

    endings = (".weight", ".bias")

    def create_optimizer(self, *args, **kwargs):
        chosen = [one for name, one in self.model.named_parameters() if name.endswith(self.endings)]
        self.optimizer = torch.optim.AdamW(chosen, lr=0.1)
        return self.optimizer


class First(ByName):
    endings = ("layers.0.self_attn.v_proj.blocks",)


@pytest.mark.parametrize("score", ["grad_l1", "random"])
def test_an_optimizer_without_the_blocks_is_refused(score, tmp_path):
    run = tiny.smt_trainer(tiny.llama(), tmp_path, tiny.config(target_modules=["v_proj"], score=score), kind=ByName)
    with pytest.raises(SMTError, match=r"holds none of the trained blocks, such as `.*v_proj\.blocks`"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_with_some_of_the_blocks_is_named(tmp_path, warnings):
    fields = {"target_modules": ["v_proj"], "scope": "per_module", "budget": 1}
    run = tiny.smt_trainer(tiny.llama(), tmp_path, tiny.config(**fields), kind=First)
    run.train()
    assert any("lacks 1 of 2 blocks' parameters, such as `model.layers.1" in line for line in warnings())
