"""One run of training in a process of its own: resumed from a checkpoint, or as one of several ranks.

    python training_script.py resume FOLDER CHECKPOINT
    accelerate launch --cpu --num_processes 2 training_script.py ranks FOLDER

Writes what came out as `FOLDER/result-RANK.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
import torch

from smt_trainer.layers import smt_layers

RANKS_BATCH = 4


def result(trainer) -> dict:
    """Everything that two runs of the same training must agree on."""
    return {
        "blocks": {name: layer.blocks.detach() for name, layer in smt_layers(trainer.model)},
        "block_indices": {name: layer.block_indices for name, layer in smt_layers(trainer.model)},
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "losses": tiny.logged(trainer, "loss"),
        "warm-ups": tiny.logged(trainer, "smt_warmup_steps"),
    }


def resumable(folder: Path, **overrides):
    """A run of six steps with dropout, each of two micro-batches, with a checkpoint after every second."""
    return tiny.smt_trainer(
        tiny.llama(attention_dropout=0.3),
        folder,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        **overrides,
    )


def ranked(folder: Path, processes: int) -> dict:
    """A run whose global batch is the same on any number of processes; its outcome, with the warm-up's scores."""
    model = tiny.llama().double()
    smt_config = tiny.config(warmup_steps=3, master_dtype="float64")
    trainer = tiny.smt_trainer(
        model,
        folder,
        smt_config,
        per_device_train_batch_size=RANKS_BATCH // processes,
        optim="sgd",
        learning_rate=1.0,
        ddp_find_unused_parameters=False,
    )
    scores = tiny.warm_up(trainer)
    trainer.train()
    trainer.save_model(folder / "delta")
    trainer.merge_and_save(folder / "merged")
    return result(trainer) | {"scores": scores}


def main(kind: str, folder: str, checkpoint: str | None = None) -> None:
    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "resume":
        trainer = resumable(Path(folder, "run"))
        trainer.train(resume_from_checkpoint=checkpoint)
        outcome = result(trainer)
    else:
        outcome = ranked(Path(folder, f"rank-{rank}"), processes)
    torch.save(outcome, Path(folder, f"result-{rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
