"""Resolve `SMTConfig.selection` to the blocks that are trained without a warm-up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.selection.block_scores import BlockScores
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.tokens import with_new_tokens

logger = logging.getLogger(__name__)


def given_selection(config: SMTConfig, model: nn.Module | None) -> BlockSelection | None:
    """Return `config.selection` with the fields of `config` that decide the training; None if there is none.

    A warning names the fields that ask for other blocks and have no effect.

    Args:
        config: has the selection.
        model: the plain model that will train the blocks; rows of its new tokens are added to them. None if it trains
            blocks already.

    Raises:
        SMTError: as in `resolve_selection`.
    """
    if config.selection is None:
        return None
    selection = resolve_selection(config.selection, config, model)
    chosen_by = SMTConfig.deciding("targets", "scores", "choice")
    given, defaults = ({name: getattr(one, name) for name in chosen_by} for one in (config, SMTConfig()))
    meaningful = {name: (defaults[name], getattr(selection.config, name)) for name in chosen_by}
    if vain := [f"{name}={value!r}" for name, value in given.items() if value not in meaningful[name]]:
        logger.warning(
            "SMTConfig.selection fixes the blocks; %s has no effect. Leave out either these fields or the selection.",
            ", ".join(vain),
        )
    trained_by = {name: getattr(config, name) for name in SMTConfig.deciding("training")}
    selection = replace(selection, config=replace(selection.config, **trained_by))
    return selection if model is None else with_new_tokens(model, selection)


def resolve_selection(
    selection: BlockSelection | Mapping[str, Any] | str | Path, config: SMTConfig, model: nn.Module | None
) -> BlockSelection:
    """Return the selection that `SMTConfig.selection` stands for.

    It may be a selection, its dictionary, file or folder, or a scores file (.safetensors), from which `config` chooses.

    Raises:
        SMTError: the file is missing, also from the folder, or damaged; or the scores do not fit `config` or the plain
            model, if one is given.
    """
    if not isinstance(selection, (str, Path)) or Path(selection).suffix != ".safetensors":
        return BlockSelection.resolve(selection)
    scores = BlockScores.load(selection)
    chosen = scores.select(config)
    if model is not None:
        scores.check_model(model, config)
    return chosen
