"""Find the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from smt_trainer.errors import SMTError
from smt_trainer.files import load_json

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
