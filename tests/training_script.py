"""One run of training in a process of its own: resumed from a checkpoint, killed, or as one of several ranks.

    python training_script.py resume FOLDER CHECKPOINT
    python training_script.py killed FOLDER MOMENT
    accelerate launch --cpu --num_processes 2 training_script.py ranks FOLDER

Writes what came out as `FOLDER/result-RANK.pt`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from transformers import TrainerState

from smt_trainer import BlockSelection, SMTCallback, delta
from smt_trainer.files import write_atomically
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


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(SMTCallback):
    """Kills the process at a moment between two writes."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment

    def on_warmup_step(self, *args) -> None:
        super().on_warmup_step(*args)
        if self.moment == "in the warm-up":
            die()

    def on_train_begin(self, *args, **kwargs) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.moment == "before the first step":
            die()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.moment == "in the main loop" and state.global_step == 5:
            die()


def die_at(moment: str) -> None:
    """Kill the process half-way through a write, where the moment is one."""
    if moment == "writing the selection":
        BlockSelection.save = lambda selection, path: write_atomically(path, half_written)
    if moment == "writing the delta":
        delta.save_file = lambda tensors, path, metadata: half_written(path)
    if moment == "writing the optimizer":
        torch.save = lambda value, path: half_written(Path(path)) if "optimizer" in str(path) else None
    if moment == "writing the state of the trainer":
        TrainerState.save_to_json = lambda state, path: half_written(Path(path))


def half_written(path: Path) -> None:
    path.write_text('{"half": ')
    die()


def main(kind: str, folder: str, detail: str | None = None) -> None:
    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run = Path(folder, "run")
    if kind == "killed":
        die_at(detail)
        resumable(run, callbacks=[Mortal(detail)]).train()
    elif kind == "resume":
        trainer = resumable(run)
        trainer.train(resume_from_checkpoint=detail)
        outcome = result(trainer)
    else:
        outcome = ranked(Path(folder, f"rank-{rank}"), processes)
    torch.save(outcome, Path(folder, f"result-{rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
