"""Find the checkpoint that a run is resumed from, and what it lacks."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from smt_trainer.delta.folder import DELTA_FILE
from smt_trainer.errors import SMTError
from smt_trainer.json_files import load_json

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in a folder: Trainer writes `trainer_state.json` last."""
    steps = {int(name[1]): path for path in folder.glob("*") if (name := CHECKPOINT.fullmatch(path.name))}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            load_json(checkpoint / TRAINER_STATE_NAME, "trainer state")
            return str(checkpoint)
        except SMTError as error:
            logger.warning("%s is incomplete and is skipped: %s", checkpoint.name, error)
    return None


def refuse_no_checkpoint(folder: Path) -> None:
    """Raise `SMTError` if a folder holds a delta but is no checkpoint, such as one that `save_model` has written."""
    if (folder / DELTA_FILE).is_file() and not (folder / TRAINER_STATE_NAME).is_file():
        raise SMTError(
            f"{folder} holds a delta, but no {TRAINER_STATE_NAME} to resume from. Pass a checkpoint of a run; or, to "
            "train the blocks of that delta further, from step 0, call load_delta(model, folder) before SMTTrainer."
        )


def warn_of_missing_optimizer(checkpoint: str | Path) -> None:
    """Warn that a run resumes without the state of its optimizer, which Trainer does not mention."""
    if Path(checkpoint, DELTA_FILE).is_file() and not any(Path(checkpoint).glob("optimizer*")):
        logger.warning(
            "%s has blocks but no optimizer state (saved with save_only_model=True, or under DeepSpeed): the optimizer "
            "and the learning rate schedule start from the beginning.",
            checkpoint,
        )
