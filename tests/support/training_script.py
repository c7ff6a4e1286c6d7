"""Training runs in separate processes: resumed from a checkpoint, killed, or on several ranks.

    python training_script.py resume FOLDER CHECKPOINT
    torchrun --nproc-per-node 2 training_script.py resume FOLDER CHECKPOINT
    torchrun --nproc-per-node 2 training_script.py ranks FOLDER

Writes the outcome to `FOLDER/result-RANK.pt`. `launch` does the same without the seconds that a new
interpreter needs for its imports: it forks processes from a server that has only imported the libraries.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

import tiny
import torch
from transformers import TrainerState

from smt_trainer import BlockSelection, SMTCallback
from smt_trainer.config import SCORES
from smt_trainer.delta import delta
from smt_trainer.files import write_atomically
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.training.trainer import SELECTION_FILE

RANKS_BATCH = 4
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["transformers.trainer", "transformers.models.llama.modeling_llama"])


def result(trainer) -> dict:
    """Return everything that two runs of the same training must agree on."""
    return {
        "blocks": {name: linear.blocks.detach() for name, linear in block_modules(trainer.model)},
        "block_indices": {name: linear.block_indices for name, linear in block_modules(trainer.model)},
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "losses": tiny.logged(trainer, "loss"),
        "warm-ups": tiny.logged(trainer, "smt_warmup_steps"),
    }


def with_dropout():
    """Make a model with dropout, whose runs depend on the random state."""
    return tiny.llama(attention_dropout=0.3)


def resumable(folder: Path, make: Callable = with_dropout, **overrides):
    """Make the trainer of six steps, each of two micro-batches, with a checkpoint after every second step."""
    defaults = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    return tiny.smt_trainer(make(), folder, **defaults | overrides)


class Evaluated(tiny.RecordingSMTTrainer):
    """A trainer with evaluation data."""

    def __init__(self, **kwargs) -> None:
        super().__init__(eval_dataset=tiny.examples(4), **kwargs)


def ranked(folder: Path, processes: int) -> dict:
    """Run with the same global batch on any number of processes; return the outcome, with the warm-up's scores."""
    model = tiny.llama().double()
    smt_config = tiny.config(smt_warmup_steps=3, master_dtype="float64")
    trainer = tiny.smt_trainer(
        model,
        folder,
        smt_config,
        per_device_train_batch_size=RANKS_BATCH // processes,
        optim="sgd",
        learning_rate=1.0,
        ddp_find_unused_parameters=False,
    )
    scores = {}
    for score in SCORES:
        trainer.smt_config = replace(smt_config, score=score)
        scores[score] = tiny.warm_up(trainer)
    trainer.smt_config = smt_config
    trainer.train()
    trainer.save_model(folder / "delta")
    trainer.merge_and_save(folder / "merged")
    return result(trainer) | {"scores": scores}


def launch(
    folder: Path,
    processes: int = 1,
    moment: str | None = None,
    delay: float | None = None,
    dying: Sequence[int] = (0,),
    checkpoint: int | None = None,
    **overrides,
) -> list[int]:
    """Train in `FOLDER/run` like a launcher: resume an earlier run, and kill all ranks as soon as one dies.

    Args:
        folder: receives the outcome.
        processes: number of ranks.
        moment: the moment at which the `dying` ranks kill themselves.
        delay: seconds from the start of training until the `dying` ranks are killed; ranks that finish earlier wait.
        dying: the ranks that die.
        checkpoint: step to resume from, instead of the last checkpoint.
        overrides: passed to `resumable`.

    Returns:
        The exit codes.
    """
    run = folder / "run"
    # Trainer raises an error if there is nothing to resume, so a launcher looks first.
    resume = (run / SELECTION_FILE).is_file() or any(run.glob("checkpoint-*"))
    if checkpoint is not None:
        resume = str(run / f"checkpoint-{checkpoint}")
    port, beginning = free_port(), FORKED.Barrier(processes + 1)
    ranks = []
    for rank in range(processes):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            # Older versions of transformers cannot load an optimizer to cpu:0.
            "ACCELERATE_TORCH_DEVICE": "cpu",
        }
        arguments = (folder, resume, moment if rank in dying else None, delay is not None, beginning, overrides)
        ranks.append(FORKED.Process(target=train, args=(environment if processes > 1 else {}, *arguments)))
        ranks[-1].start()
    beginning.wait(timeout=300)
    if delay is not None:
        time.sleep(delay)
        for rank in dying:
            ranks[rank].kill()
    while alive := [process for process in ranks if process.exitcode is None]:
        if any(process.exitcode for process in ranks):
            for process in alive:
                process.kill()
        connection.wait([process.sentinel for process in alive])
    return [process.exitcode for process in ranks]


def train(
    environment: dict, folder: Path, resume: bool | str, moment: str | None, doomed: bool, beginning, overrides
) -> None:
    """Run one rank of `launch`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A garbage collection would touch, and so copy, all imports of the server, which takes a second.
    gc.freeze()
    trainer = resumable(folder / "run", callbacks=[Mortal(moment)], **overrides)
    die_at(moment)
    beginning.wait(timeout=300)
    (folder / "begun").touch()
    trainer.train(resume_from_checkpoint=resume)
    if doomed:
        signal.pause()
    torch.save(result(trainer), folder / f"result-{trainer.args.process_index}.pt")


def torchrun(script: str, processes: int, *arguments: str | Path, **environment: str) -> None:
    """Run a file with torchrun, in new interpreters."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    _run_module([*launcher, script, *arguments], environment)


def accelerate_launch(config: Path, script: str, *arguments: str | Path, **environment: str) -> None:
    """Run a file with an accelerate configuration file, but on two processes and in full precision."""
    launcher = ["accelerate.commands.launch", "--config_file", config, "--num_processes=2", "--mixed_precision=no"]
    _run_module([*launcher, f"--main_process_port={free_port()}", script, *arguments], environment)


def _run_module(command: list, environment: dict[str, str]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    subprocess.run([sys.executable, "-m", *command], check=True, env=environment, timeout=600)


def outcomes(folder: Path, processes: int = 1) -> list[dict]:
    """Return what each rank of a run wrote."""
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(processes)]


def duration(folder: Path) -> float:
    """Return the seconds that the training of a `launch` took."""
    begun, ended = ((folder / name).stat().st_mtime for name in ("begun", "result-0.pt"))
    return ended - begun


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(SMTCallback):
    """Kills the process at a given moment of training."""

    def __init__(self, moment: str | None) -> None:
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


def die_at(moment: str | None) -> None:
    """Make the process die in the middle of a write, if `moment` names a write."""
    if moment == "writing the selection":
        BlockSelection.save = lambda selection, path: write_atomically(path, half_written)
    if moment == "writing the delta":
        delta.save_arrays = lambda arrays, path, metadata: half_written(path)
    if moment == "writing the optimizer":
        torch.save = saving_until("optimizer", half_written)
    if moment == "before the random state":
        torch.save = saving_until("rng_state", die_late)
    if moment == "deleting a checkpoint":
        shutil.rmtree = lambda path, **_: half_deleted(Path(path))
    if moment == "writing the state of the trainer":
        TrainerState.save_to_json = lambda state, path: half_written(Path(path))


def saving_until(name: str, last: Callable[[Path], None], save=torch.save) -> Callable:
    """Return a `torch.save` that calls `last` instead of saving the file with the given name."""
    return lambda value, path: last(Path(path)) if name in str(path) else save(value, path)


def half_written(path: Path) -> None:
    path.write_text('{"half": ')
    die()


def half_deleted(path: Path) -> None:
    for file in sorted(path.iterdir())[::2]:
        file.unlink()
    die()


def die_late(path: Path) -> None:
    """Die so late that the other rank, unless it waits, has finished the checkpoint."""
    time.sleep(2)
    die()


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
