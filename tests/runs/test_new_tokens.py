"""Runs after `resize_token_embeddings`: of embeddings and head only the new rows are trained, stored and merged."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tied import either_base, load  # noqa: F401  # the fixture `base`

from smt_trainer import (
    BlockScores,
    SMTError,
    SMTTrainer,
    applied,
    compose_deltas,
    convert_to_smt,
    delta_patches,
    export_lora,
    from_delta,
    load_delta,
    merge_checkpoint,
    save_delta,
    select_tokens,
    unmerge,
    verify_merge,
)

OLD, NEW = tiny.VOCABULARY, tiny.VOCABULARY + 16
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
SAVES = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def resized(folder):
    """Load a model and add sixteen tokens, whose rows are the same in each call."""
    model = load(folder)
    torch.manual_seed(3)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def modules(model) -> list[str]:
    return [EMBEDDINGS] if model.config.tie_word_embeddings else [EMBEDDINGS, HEAD]


def batch() -> dict[str, torch.Tensor]:
    """Make sequences with new tokens in them."""
    rows = tiny.batch()["input_ids"].clone()
    rows[:, ::2] = OLD + torch.arange(rows[:, ::2].numel()).reshape(rows[:, ::2].shape) % (NEW - OLD)
    return {"input_ids": rows, "labels": rows}


def trained(base, folder, steps: int = 4, resume=None, **fields):
    """Train on sequences with new tokens."""
    data = [{name: rows[place % 4] for name, rows in batch().items()} for place in range(16)]
    args = tiny.arguments(folder, max_steps=steps, **SAVES)
    trainer = SMTTrainer(model=resized(base), args=args, train_dataset=data, smt_config=tiny.config(**fields))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_delta_is_trained_further_with_the_selection_that_it_came_from(base, tmp_path):
    given = tiny.choose(load(base))
    trained(base, tmp_path / "run", selection=given).save_model(tmp_path / "delta")
    model = load_delta(load(base), tmp_path / "delta")
    data = [{name: rows[0] for name, rows in batch().items()}] * 8
    SMTTrainer(model, tiny.arguments(tmp_path), train_dataset=data, smt_config=tiny.config(selection=given)).train()
    other = tiny.choose(load(base), tiny.config(budget=11, score="random"))
    with pytest.raises(SMTError, match="selection: other blocks"):
        SMTTrainer(model, tiny.arguments(tmp_path), train_dataset=data, smt_config=tiny.config(selection=other))


@pytest.mark.parametrize(
    "fields", [{}, {"target_modules": ["embed_tokens", "q_proj"], "block_size": 16}], ids=["", "blocks"]
)
def test_new_rows_are_trained_beside_the_blocks_and_come_back(base, tmp_path, fields):
    before = {name: value.clone() for name, value in resized(base).state_dict().items()}
    trainer = trained(base, tmp_path / "run", **fields)
    model, selection = trainer.model, trainer.smt_selection
    for name in modules(model):
        assert selection.covers_rows(name, range(OLD, NEW))
        changed = (model.state_dict()[f"{name}.weight"] != before[f"{name}.weight"]).any(1)
        assert changed[OLD:].all() and (fields or not changed[:OLD].any())
    trainer.save_model(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "smt_delta.safetensors")
    assert not any(tensor.shape[0] >= OLD for tensor in stored.values())
    trainer.merge_and_save(tmp_path / "merged")
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "streamed")
    assert not verify_merge(base, tmp_path / "delta", tmp_path / "streamed").problems
    expected = tiny.logits(model, **batch())
    loaded = [load(tmp_path / name) for name in ("merged", "streamed")]
    loaded += [from_delta(tmp_path / "delta", base=str(base)), load_delta(load(base), tmp_path / "delta")]
    loaded += [load_delta(resized(base), tmp_path / "delta", merge=True)]
    for one in loaded:
        assert one.config.vocab_size == one.get_input_embeddings().num_embeddings == NEW
        assert torch.equal(tiny.logits(one, **batch()), expected)
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == one.config.tie_word_embeddings


@pytest.mark.parametrize("where", ["embeddings", "head"])
def test_a_base_whose_old_rows_were_tuned_since_is_refused(base, tmp_path, where):
    trained(base, tmp_path / "run").save_model(tmp_path / "delta")
    tuned = load(base)
    module = tuned.get_input_embeddings() if where == "embeddings" else tuned.get_output_embeddings()
    with torch.no_grad():
        module.weight[5, 3] += 1e-3
    tuned.save_pretrained(tmp_path / "tuned")
    folder, refused = str(tmp_path / "tuned"), pytest.raises(SMTError, match="has other values in 1 of its")
    with refused:
        load_delta(load(folder), tmp_path / "delta")
    with refused:
        load_delta(resized(folder), tmp_path / "delta")
    with refused:
        from_delta(tmp_path / "delta", base=folder)
    with refused:
        merge_checkpoint(folder, tmp_path / "delta", tmp_path / "merged")


def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path):
    whole = trained(base, tmp_path / "whole").model
    trained(base, tmp_path / "halves", steps=2)
    again = trained(base, tmp_path / "halves", resume=True).model
    tiny.assert_same(again.state_dict(), whole.state_dict())


def test_only_the_rows_of_new_tokens_are_selected_in_the_head(base):
    model = resized(base)
    selection = select_tokens(model, [7, *range(OLD, NEW)])
    assert list(selection.block_indices) == modules(model)
    assert selection.block_indices[EMBEDDINGS][:, 0].tolist() == [7, *range(OLD, NEW)]
    assert selection.block_indices[modules(model)[-1]][OLD - NEW :, 0].tolist() == list(range(OLD, NEW))
    assert list(select_tokens(model, [7]).block_indices) == [EMBEDDINGS]


def test_a_loop_of_ones_own_is_told_of_rows_that_it_would_lose(base, tmp_path):
    model = resized(base)
    blocks = BlockScores.of(model, tiny.config(), [batch()]).select()
    for selection in (blocks, select_tokens(model, range(OLD, NEW - 1), beside=blocks)):
        with pytest.raises(SMTError, match=r"has rows for tokens that the checkpoint .* does not have.*select_tokens"):
            convert_to_smt(model, selection)
    convert_to_smt(model, select_tokens(model, range(OLD, NEW), beside=blocks))
    tiny.step(model, **batch())
    save_delta(model, tmp_path / "delta")
    again = from_delta(tmp_path / "delta", base=str(base))
    assert torch.equal(tiny.logits(again, **batch()), tiny.logits(model, **batch()))


def test_a_merge_is_taken_back_and_what_has_no_place_for_new_rows_is_refused(base, tmp_path):
    trained(base, tmp_path / "run").save_model(tmp_path / "delta")
    merge_checkpoint(base, tmp_path / "delta", tmp_path / "merged")
    unmerge(base, tmp_path / "delta", tmp_path / "merged", tmp_path / "back")
    tiny.assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(base / "model.safetensors"))
    with pytest.raises(SMTError, match="another vocabulary than its base"):
        delta_patches(base, tmp_path / "delta")
    with pytest.raises(SMTError, match=r"rows of new tokens in `.*`, which the base does not have"):
        compose_deltas(base, [tmp_path / "delta"], tmp_path / "sum")
    with pytest.raises(SMTError, match=r"is an embedding, and an adapter|rows of new tokens"):
        export_lora(base, tmp_path / "delta", tmp_path / "lora")
    with pytest.raises(SMTError, match=r"this model has a weight of 64x64"), applied(load(base), tmp_path / "delta"):
        pass


def test_a_delta_of_new_tokens_leaves_a_model_that_it_does_not_fit_as_it_was(base, tmp_path):
    trained(base, tmp_path / "run").save_model(tmp_path / "delta")
    other = load(base)
    with torch.no_grad():
        other.model.norm.weight += 1
    before = tiny.weights(other)
    with pytest.raises(SMTError, match="has other values"):
        load_delta(other, tmp_path / "delta")
    assert other.config.vocab_size == OLD
    tiny.assert_same(dict(other.state_dict()), before)
