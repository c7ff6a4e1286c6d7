"""Runs that train rows of the embeddings, from the warm-up to the merged checkpoint."""

import functools

import pytest
import tiny
import torch
from ranks import assert_two_ranks_train_like_one_process
from safetensors.torch import load_file, save_file
from tied import either_base, load  # noqa: F401  # the fixture `base`

from smt_trainer import (
    SMTError,
    SMTTrainer,
    applied,
    delta_patches,
    export_lora,
    extract_delta,
    from_delta,
    merge_checkpoint,
    select_tokens,
    unmerge,
    verify_merge,
)
from smt_trainer.cli import main

NAME = "model.embed_tokens"
RUNS = {
    "frequent": {"score": "activation", "granularity": "row"},
    "by gradient": {"granularity": "row"},
    "with projections": {"target_modules": ["embed_tokens", "q_proj"], "block_size": 16},
}


def trainer_of(base, folder, **fields) -> SMTTrainer:
    asked = tiny.config(**{"target_modules": ["embed_tokens"], "block_size": "auto", "budget": 10} | fields)
    return tiny.smt_trainer(load(base), folder, asked)


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_a_run_is_saved_loaded_merged_and_verified(fields, base, tmp_path):
    trainer = trainer_of(base, tmp_path / "run", **fields)
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    trainer.model.save_pretrained(tmp_path / "plain")
    trained = tiny.logits(trainer.model)
    folders = [str(tmp_path / name) for name in ("base", "delta", "by smt")]
    assert main(["merge", *folders]) == main(["verify", *folders]) == main(["inspect", folders[1]]) == 0
    plain = load(base)
    assert not torch.equal(tiny.logits(plain), trained)
    loaded = [load(tmp_path / name) for name in ("merged", "by smt", "plain")]
    for model in (*loaded, from_delta(tmp_path / "delta", base=str(base))):
        assert torch.equal(tiny.logits(model), trained)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    with applied(plain, tmp_path / "delta"):
        assert torch.equal(tiny.logits(plain), trained)
    with pytest.raises(SMTError, match=rf"`{NAME}` is an embedding, and an adapter is written for linears only"):
        export_lora(base, tmp_path / "delta", tmp_path / "lora")


def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path):
    for folder, steps in (("whole", 4), ("halves", 2)):
        selection = select_tokens(load(base), [7, 20, 41])
        for total in range(steps, 5, steps):
            trainer = tiny.smt_trainer(
                load(base),
                tmp_path / folder,
                tiny.config(selection=selection),
                max_steps=total,
                lr_scheduler_type="constant",
                save_strategy="steps",
                save_steps=2,
            )
            trainer.train(resume_from_checkpoint=total > steps or None)
        trainer.save_model(tmp_path / f"{folder} delta")
    first, second = (load_file(tmp_path / f"{name} delta" / "smt_delta.safetensors") for name in ("whole", "halves"))
    tiny.assert_same(first, second)
    assert first[f"{NAME}.blocks"].shape == (3, 1, 64)
    before = load_file(base / "model.safetensors")[f"{NAME}.weight"]
    assert not (first[f"{NAME}.blocks"].squeeze(1) == before[[7, 20, 41]]).all(1).any()


def test_rows_are_extracted_from_any_fine_tuning(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "run", granularity="row")
    trainer.train()
    trainer.merge_and_save(tmp_path / "merged")
    rows = {"target_modules": ["embed_tokens"], "granularity": "row"}
    found = extract_delta(base, tmp_path / "merged", tmp_path / "extracted", **rows)
    assert found.is_exact and not found.whole and found.selection.num_blocks <= 10
    model = from_delta(tmp_path / "extracted", base=str(base))
    assert torch.equal(tiny.logits(model), tiny.logits(trainer.model))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_a_tied_pair_like_one_process(tmp_path):
    assert_two_ranks_train_like_one_process(
        tmp_path,
        make=functools.partial(tiny.llama, tie_word_embeddings=True),
        smt_config=tiny.config(target_modules=["embed_tokens"], granularity="row", block_size="auto"),
    )


def test_a_tied_tensor_that_is_stored_twice_is_merged_and_patched_twice(tmp_path):
    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors[f"{NAME}.weight"].clone()}, path, {"format": "pt"})
    trainer = trainer_of(tmp_path / "base", tmp_path / "run", granularity="row")
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged[f"{NAME}.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors[f"{NAME}.weight"])
    assert not verify_merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged").problems
    assert torch.equal(tiny.logits(load(tmp_path / "merged")), tiny.logits(trainer.model))
    patched = {patch.name for patch in delta_patches(tmp_path / "base", tmp_path / "delta")}
    assert patched == {"lm_head.weight", f"{NAME}.weight"}
    unmerge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged", tmp_path / "back")
    tiny.assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(path))
