"""Training without a trainer: scores, blocks, a custom loop, a delta."""

import pytest
import tiny
import torch

from smt_trainer import BlockScores, SMTError, convert_to_smt, from_delta, merge_and_unload, save_delta
from smt_trainer.sparse.block_module import block_modules


def own_loop(model, steps: int = 4, optimizer_class=torch.optim.AdamW) -> list[float]:
    """Train in the simplest way; nothing here is specific to blocks."""
    optimizer = optimizer_class([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**tiny.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_six_lines_choose_train_and_save(base, llama, tmp_path):
    before = tiny.weights(llama)
    scores = BlockScores.of(llama, tiny.config(), [tiny.batch(seed=seed) for seed in range(5)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    convert_to_smt(llama, scores.select())
    losses = own_loop(llama)
    save_delta(llama, tmp_path / "delta")
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    trained = from_delta(tmp_path / "delta", base=str(base))
    assert torch.equal(tiny.logits(trained), tiny.logits(llama))


@pytest.mark.parametrize("score", ["grad_l1", "grad_signed", "taylor", "activation"])
def test_gradients_of_before_are_there_after_scoring(score, llama):
    llama(**tiny.batch()).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    BlockScores.of(llama, tiny.config(score=score), [tiny.batch(seed=2)])
    tiny.assert_same({name: parameter.grad for name, parameter in llama.named_parameters()}, before)


def test_a_loop_may_hold_all_parameters_and_generate_in_between(llama):
    """As PEFT's MetaMathQA harness does."""
    before = tiny.weights(llama)
    convert_to_smt(llama, tiny.choose(llama))
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        llama.train()
        optimizer.zero_grad()
        llama(**tiny.batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        with torch.inference_mode():
            found = llama.eval().generate(tiny.batch()["input_ids"][:1], max_new_tokens=2, do_sample=False)
    trained = {f"{name}.weight": linear.blocks.numel() for name, linear in block_modules(llama)}
    plain = merge_and_unload(llama)
    assert torch.equal(plain.generate(tiny.batch()["input_ids"][:1], max_new_tokens=2, do_sample=False), found)
    for name, weight in plain.state_dict().items():
        assert (weight != before[name]).sum() == trained.get(name, 0)


def test_the_scores_are_those_of_the_trainers_warm_up(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, gradient_accumulation_steps=1)
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader) for _ in range(2)]
    ours, theirs = BlockScores.of(tiny.llama().train(), trainer.smt_config, batches).scores, tiny.warm_up(trainer)
    # Releases of transformers scale the loss of a step differently, which changes no ranking.
    factor = max(score.max() for score in ours.values()) / max(score.max() for score in theirs.values())
    torch.testing.assert_close(ours, {name: factor * score for name, score in theirs.items()})


def test_forward_sees_blocks_changed_outside_an_optimizer(llama):
    convert_to_smt(llama, tiny.choose(llama))
    before = tiny.logits(llama)
    linears = [linear for _, linear in block_modules(llama)]
    with torch.no_grad():
        linears[0].blocks.add_(1.0)
    changed = tiny.logits(llama)
    assert not torch.equal(changed, before)
    for linear in linears:
        held = linear.grid.gather(linear.weight, linear.block_indices)
        assert torch.equal(held, linear.blocks.detach())


def test_an_empty_list_of_batches_is_refused(llama):
    with pytest.raises(SMTError, match="there is no batch to score blocks on"):
        BlockScores.of(llama, tiny.config(), [])


def test_batches_without_labels_are_refused(llama):
    batch = {"input_ids": tiny.tokens(2)}
    with pytest.raises(SMTError, match=r"returned no loss to score blocks by\. Give it labels"):
        BlockScores.of(llama, tiny.config(), [batch])
    assert BlockScores.of(llama, tiny.config(score="activation"), [batch]).select().num_blocks
