"""A second run on the same trainer or model, and what was bound or wrapped before the blocks were chosen."""

import pytest
import tiny
import torch
import transformers

from smt_trainer import SMTConfig, SMTError, SMTTrainer, SMTTrainerMixin, load_delta, merge_and_unload
from smt_trainer.sparse.state import is_smt_model


def trained(folder, model=None, **kwargs):
    trainer = tiny.smt_trainer(model or tiny.llama(), folder, **kwargs)
    trainer.train()
    return trainer


# ---- an optimizer from before ----

BEFORE = {
    "create_optimizer": lambda trainer: trainer.create_optimizer(),
    "create_optimizer_and_scheduler": lambda trainer: trainer.create_optimizer_and_scheduler(4),
    "an assignment": lambda trainer: setattr(trainer, "optimizer", torch.optim.SGD(trainer.model.parameters(), lr=1)),
    "a scheduler": lambda trainer: setattr(
        trainer,
        "lr_scheduler",
        torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(trainer.model.parameters(), lr=1)),
    ),
}


@pytest.mark.parametrize("prepare", BEFORE.values(), ids=BEFORE)
def test_an_optimizer_from_before_the_blocks_is_refused_before_the_warm_up(prepare, tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path)
    prepare(trainer)
    with pytest.raises(SMTError, match=r"is bound to parameters from before.*Pass optimizer_cls_and_kwargs="):
        trainer.train()
    assert not is_smt_model(trainer.model) and not list(tmp_path.glob("smt_*"))


def test_the_optimizer_of_a_run_whose_model_was_merged_is_refused(tmp_path):
    trainer = trained(tmp_path)
    merge_and_unload(trainer.model)
    with pytest.raises(SMTError, match="is bound to parameters from before"):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert trainer.losses[-1] < trainer.losses[0]


def test_training_on_top_of_a_merged_delta_says_that_no_checkpoint_is_its_base(tmp_path, warnings):
    model = merge_and_unload(trained(tmp_path / "first").model)
    assert not [line for line in warnings() if "A delta was merged" in line]
    trained(tmp_path / "second", model).save_model(tmp_path / "delta")
    (line,) = [line for line in warnings() if "A delta was merged into this model" in line]
    assert "Save the merged model first" in line and "from_delta(..., merge=False)" in line
    with pytest.raises(SMTError, match="if another delta was merged into it, merge that one first"):
        load_delta(tiny.llama(), tmp_path / "delta")


def test_an_optimizer_of_the_blocks_may_be_given(tmp_path):
    trained(tmp_path).save_model(tmp_path / "delta")
    model = load_delta(tiny.llama(), tmp_path / "delta")
    blocks = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [each.detach().clone() for each in blocks]
    trainer = SMTTrainer(
        model,
        tiny.arguments(tmp_path),
        train_dataset=tiny.examples(),
        optimizers=(torch.optim.SGD(blocks, lr=0.1), None),
    )
    trainer.train()
    assert all(not torch.equal(each, old) for each, old in zip(blocks, before, strict=True))


@pytest.mark.parametrize("resume", [None, True])
def test_a_second_call_of_train_goes_on(resume, tmp_path):
    trainer = trained(tmp_path, save_strategy="steps", save_steps=2)
    before = trainer.losses.copy()
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=resume)
    assert len(trainer.losses) - len(before) == (2 if resume else 6)


# ---- a model that trains blocks already ----

OTHER = [
    {"target_modules": "mlp"},
    {"score": "magnitude"},
    {"budget": 3},
    {"train_norm": True},
    {"smt_warmup_steps": 3},
]


@pytest.mark.parametrize("fields", OTHER, ids=str)
def test_a_trained_model_is_refused_under_another_configuration(fields, tmp_path):
    model = trained(tmp_path).model
    (name, value) = next(iter(fields.items()))
    with pytest.raises(SMTError, match=rf"trains blocks already.*{name}: {value!r} != .*merge_and_save"):
        tiny.smt_trainer(model, tmp_path, tiny.config(**fields))


@pytest.mark.parametrize("smt_config", [None, tiny.config(), tiny.config(accumulator_device="cpu")], ids=bool)
def test_a_trained_model_goes_on_under_the_same_configuration_or_none(smt_config, tmp_path):
    first = trained(tmp_path)
    trainer = tiny.RecordingSMTTrainer(
        first.model, tiny.arguments(tmp_path), train_dataset=tiny.examples(), smt_config=smt_config
    )
    trainer.train()
    assert trainer.smt_selection is first.smt_selection
    assert trainer.losses[0] < first.losses[0] and trainer.smt_config.budget == 12


def test_a_trained_model_is_refused_with_a_selection_of_other_blocks(tmp_path):
    plain = tiny.llama()
    one, other = (tiny.choose(plain, seed=seed) for seed in (0, 1))
    model = trained(tmp_path, smt_config=tiny.config(selection=one)).model
    tiny.smt_trainer(model, tmp_path, tiny.config(selection=one)).train()
    with pytest.raises(SMTError, match="selection: other blocks"):
        tiny.smt_trainer(model, tmp_path, tiny.config(selection=other))


def test_a_configuration_changed_between_two_runs_is_refused(tmp_path):
    trainer = trained(tmp_path)
    trainer.smt_config = SMTConfig(block_size=16, budget=3)
    with pytest.raises(SMTError, match="budget: 3 != 12"):
        trainer.train()


# ---- frozen by the user ----


def test_frozen_layers_stay_as_they_are(tmp_path):
    model = tiny.llama()
    before = tiny.weights(model)
    model.model.layers[0].requires_grad_(False)
    after = tiny.weights(merge_and_unload(trained(tmp_path, model).model))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("layers.1." in name for name in changed)
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].parameters())


def test_layers_frozen_after_the_trainer_was_made_stay_as_they_are(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path)
    trainer.model.model.layers[1].requires_grad_(False)
    trainer.train()
    assert all("layers.0." in name for name in trainer.smt_selection.block_indices)


def test_a_selection_in_frozen_layers_is_trained_and_the_log_says_so(tmp_path, warnings):
    model = tiny.llama()
    selection = tiny.choose(model)
    model.model.layers[0].requires_grad_(False)
    trainer = trained(tmp_path, model, smt_config=tiny.config(selection=selection))
    assert trainer.smt_selection.block_indices.keys() == selection.block_indices.keys()
    assert any("The selection has blocks in" in line for line in warnings())


# ---- wrapped or misplaced ----


@pytest.mark.parametrize("how", ["model=", "first", "model_init"])
def test_a_compiled_model_is_trained_by_its_plain_self(how, tmp_path, warnings):
    usual = trained(tmp_path)
    compiled = torch.compile(tiny.llama(), backend="eager")
    kwargs = {"args": tiny.arguments(tmp_path), "train_dataset": tiny.examples(), "smt_config": tiny.config()}
    if how == "first":
        trainer = tiny.RecordingSMTTrainer(compiled, **kwargs)
    else:
        kwargs[how.removesuffix("=")] = compiled if how == "model=" else lambda: compiled
        trainer = tiny.RecordingSMTTrainer(**kwargs)
    trainer.train()
    assert trainer.losses == usual.losses
    assert trainer.smt_selection.to_dict() == usual.smt_selection.to_dict()
    assert trainer.model is compiled._orig_mod and "torch_compile=True" in warnings()[0]


@pytest.mark.parametrize("front", [transformers.Trainer, transformers.Seq2SeqTrainer])
@pytest.mark.parametrize("ours", [SMTTrainerMixin, SMTTrainer])
def test_a_trainer_in_front_of_the_mixin_is_refused_when_the_class_is_made(front, ours):
    if not issubclass(ours, front):
        with pytest.raises(SMTError, match=rf"Wrong has {front.__name__} in front of SMTTrainerMixin.*Write class"):
            type("Wrong", (front, ours), {})


def test_a_mixin_of_ones_own_may_stand_in_front():
    assert issubclass(type("Right", (tiny.Recording, SMTTrainerMixin, transformers.Trainer), {}), SMTTrainer.__base__)
