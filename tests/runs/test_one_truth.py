"""Forward, evaluation, the delta and the merge hold the same values, whoever changed the blocks."""

import copy
import functools

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, TrainerCallback

from smt_trainer import convert_to_smt, from_delta, merge_and_unload, save_delta
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.plain import plain_state_dict


def assert_written(model) -> None:
    """The dense weights hold the blocks."""
    for _, linear in block_modules(model):
        held = linear.grid.gather(linear.weight, linear.block_indices)
        assert torch.equal(held, linear.blocks.detach().to(held.dtype))


@pytest.fixture
def rewritten(llama):
    return convert_to_smt(llama, tiny.choose(llama))


OPTIMIZERS = {
    "fused": lambda blocks: torch.optim.AdamW(blocks, lr=1e-2, fused=True),
    "foreach": lambda blocks: torch.optim.AdamW(blocks, lr=1e-2, foreach=True),
    "single": lambda blocks: torch.optim.AdamW(blocks, lr=1e-2, foreach=False),
    "sgd": lambda blocks: torch.optim.SGD(blocks, lr=1e-1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("copied", [False, True], ids=["model", "copy"])
def test_the_step_of_any_optimizer_is_written(make, copied, rewritten):
    model = copy.deepcopy(rewritten) if copied else rewritten
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(**tiny.batch()).loss.backward()
    before = tiny.weights(model)
    optimizer.step()
    assert_written(model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tiny.weights(model).items())
    assert_written(rewritten)


def test_an_optimizer_of_something_else_writes_nothing(rewritten):
    other = torch.nn.Linear(2, 2)
    linear = next(linear for _, linear in block_modules(rewritten))
    linear.blocks.data.add_(1.0)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(linear.grid.gather(linear.weight, linear.block_indices), linear.blocks.detach())


def swap_quietly(model) -> None:
    """What averaging callbacks do: they leave no trace in the version of a tensor."""
    for _, linear in block_modules(model):
        linear.blocks.data.mul_(0.5)


LOOKS = {
    "evaluation": lambda model: model.train().eval(),
    "state dict": lambda model: model.state_dict(),
    "plain state dict": plain_state_dict,
    "merge": lambda model: merge_and_unload(copy.deepcopy(model)) and model.eval(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_values_that_changed_without_a_trace_are_written_before_anybody_looks(look, rewritten):
    swap_quietly(rewritten)
    look(rewritten)
    assert_written(rewritten)


class Averaging(TrainerCallback):
    """Swaps the trained values at the end of training, as EMA and SWA do."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        swap_quietly(model)


def test_evaluation_delta_and_merge_agree_after_a_callback_swapped_the_values(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = tiny.smt_trainer(model, tmp_path / "run", callbacks=[Averaging()])
    trainer.train()
    seen = trainer.evaluate(tiny.examples())["eval_loss"]
    trainer.save_model(str(tmp_path / "delta"))
    trainer.merge_and_save(tmp_path / "merged")
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        from_delta(tmp_path / "delta", base=str(base)),
    ):
        stock = transformers.Trainer(again, tiny.arguments(tmp_path / "stock"))
        assert stock.evaluate(tiny.examples())["eval_loss"] == seen


def average_of_the_state_dict(average, model, decay) -> None:
    """Average all tensors of two models, as timm's ModelEma does: what is no float is rounded towards zero."""
    with torch.no_grad():
        for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * theirs)


@pytest.mark.parametrize("by", ["torch", "state dict"])
def test_an_average_of_all_buffers_keeps_the_blocks_in_their_places(by, base, tmp_path):
    decay, rewritten = 0.9, AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(rewritten, tiny.choose(rewritten))
    if by == "torch":
        averaged = AveragedModel(rewritten, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        averaged.update_parameters(rewritten)
        average, update = averaged.module, averaged.update_parameters
    else:
        average = copy.deepcopy(rewritten)
        update = functools.partial(average_of_the_state_dict, average, decay=decay)
    expected = {name: linear.blocks.detach().clone() for name, linear in block_modules(rewritten)}
    for _ in range(3):
        tiny.step(rewritten, **tiny.batch())
        update(rewritten)
        for name, linear in block_modules(rewritten):
            expected[name].lerp_(linear.blocks.detach(), 1 - decay)
    seen = tiny.logits(average)
    by_hand = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(by_hand, rewritten.smt_state.selection)
    with torch.no_grad():
        for name, linear in block_modules(by_hand):
            linear.blocks.copy_(expected[name])
    torch.testing.assert_close(seen, tiny.logits(by_hand))
    save_delta(average, tmp_path / "average")
    torch.testing.assert_close(tiny.logits(from_delta(tmp_path / "average", base=str(base))), seen)


def test_a_stock_trainer_trains_the_blocks_of_a_rewritten_model(tmp_path):
    model = tiny.llama()
    tiny.smt_trainer(model, tmp_path / "first").train()
    before = tiny.logits(model)
    tiny.stock_trainer(model, tmp_path / "second").train()
    assert_written(model)
    logits = tiny.logits(model)
    assert not torch.equal(logits, before)
    assert torch.equal(tiny.logits(merge_and_unload(model)), logits)


def test_save_pretrained_writes_the_plain_model(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **tiny.batch())
    swap_quietly(model)
    model.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(tiny.logits(plain), tiny.logits(model))
    model.model.save_pretrained(tmp_path / "part")
    assert not any("block" in key for key in load_file(tmp_path / "part/model.safetensors"))
    ignored = merge_and_unload(model)._keys_to_ignore_on_save
    assert not any("block" in key for key in ignored)
