"""Choose the rows of given tokens (special tokens, for example) in the input embeddings, whatever their scores.

Rows of new tokens, which `model.resize_token_embeddings` adds to those of the checkpoint, are always chosen in addition
to other blocks, since no base can restore them. This includes the new rows of output embeddings that are not tied.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.base import base_name
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import named_targets
from smt_trainer.model.names import lies_in
from smt_trainer.model.newly_initialised import new_rows
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.settings import is_int


def select_tokens(model: nn.Module, tokens: Iterable[int], beside: BlockSelection | None = None) -> BlockSelection:
    """Select the rows of tokens in a model's input embeddings, alone or in addition to other blocks.

    Pass the result as `SMTConfig.selection`, or to `convert_to_smt`. Tied output embeddings share the rows; in output
    embeddings that are not tied, the rows of new tokens are selected as well. In a padded vocabulary (Qwen's), new
    tokens use rows that the checkpoint has, so they must be selected by this function.

    Args:
        model: plain, with `get_input_embeddings`.
        tokens: their ids, such as `tokenizer.convert_tokens_to_ids(...)`.
        beside: other blocks to train, such as those of `BlockScores.select`; its configuration is kept.

    Raises:
        SMTError: a token is not in the vocabulary, the embeddings cannot be trained, or `beside` has blocks of another
            shape in them.
    """
    embeddings = model.get_input_embeddings()  # pyrefly: ignore[not-callable]  # a model of transformers has it
    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    rows = list(dict.fromkeys(map(_as_int, tokens)))
    grid = _row_grid(model, name)
    outside = [row for row in rows if not is_int(row) or not 0 <= row < grid.out_features]
    if outside or not rows:
        raise SMTError(
            f"tokens must be ids from 0 to {grid.out_features - 1}, the rows of `{name}`, got "
            f"{outside[0] if outside else 'none'!r}. For new tokens, call model.resize_token_embeddings first."
        )
    if beside is not None and beside.grids.get(name, grid) != grid:
        raise SMTError(
            f"the selection has blocks of {'x'.join(map(str, beside.grids[name].block_shape))} in `{name}`, and tokens "
            "are whole rows. Leave the embeddings out of its target_modules, or choose rows (granularity='row')."
        )
    wanted: dict[str, Iterable[int]] = {name: rows}
    for module, new in _new_tokens(model).items():
        if module != name and any(row in new for row in rows):
            wanted[module] = [row for row in rows if row in new]
    return _with_rows(model, wanted, beside)


def _as_int(token: Any) -> Any:
    """Return an integer of NumPy or torch as an `int`, and anything else unchanged."""
    try:
        return token if isinstance(token, bool) else operator.index(token)
    except TypeError:
        return token


def with_new_tokens(model: nn.Module, selection: BlockSelection) -> BlockSelection:
    """Add the rows of all tokens that a plain model's checkpoint does not have, except in modules trained whole.

    Raises:
        SMTError: the embeddings cannot be trained.
    """
    wanted = _new_beside(model, selection.config, selection.block_indices)
    return _with_rows(model, wanted, selection) if wanted else selection


def new_token_grids(model: nn.Module, config: SMTConfig, linears: Iterable[str]) -> dict[str, BlockGrid]:
    """Return the grids of the rows that `with_new_tokens` adds to blocks in some linears.

    Raises:
        SMTError: the embeddings cannot be trained.
    """
    return {name: _row_grid(model, name) for name in _new_beside(model, config, linears)}


def lost_rows(model: nn.Module, selection: BlockSelection) -> list[str]:
    """Return the weights of a plain model that have rows which neither its checkpoint nor a selection holds."""
    return [f"{name}.weight" for name, rows in _new_tokens(model).items() if not selection.covers_rows(name, rows)]


def _new_beside(model: nn.Module, config: SMTConfig, linears: Iterable[str]) -> dict[str, range]:
    """Return module name -> rows of new tokens, without modules that are trained whole."""
    found = _new_tokens(model)
    for whole in find_whole(model, config, linears) if found else ():
        found = {name: rows for name, rows in found.items() if not lies_in(name, whole)}
    return found


def _new_tokens(model: nn.Module) -> dict[str, range]:
    return {name.removesuffix(".weight"): rows for name, rows in new_rows(model).items()}


def _row_grid(model: nn.Module, name: str) -> BlockGrid:
    config = SMTConfig(target_modules=[name], granularity="row", score="random")
    return target_grids(find_targets(model, config), config)[name]


def _with_rows(model: nn.Module, wanted: Mapping[str, Iterable[int]], beside: BlockSelection | None) -> BlockSelection:
    """Return `beside`, or an empty selection, with all blocks added that hold `wanted`: module name -> rows."""
    grids, indices = (dict(beside.grids), dict(beside.block_indices)) if beside else ({}, {})
    for name, rows in wanted.items():
        grid = grids[name] = grids.get(name) or _row_grid(model, name)
        lines = np.unique(np.array([*rows]) // grid.block_rows)
        chosen = np.stack(np.meshgrid(lines, np.arange(grid.shape[1]), indexing="ij"), axis=-1).reshape(-1, 2)
        indices[name] = np.unique(np.concatenate([indices.get(name, chosen), chosen]), axis=0)
    order = [name for name in named_targets(model) if name in grids]
    grids = {name: grids[name] for name in order}
    indices = {name: indices[name] for name in order if name in indices}
    if beside is not None:
        return replace(beside, grids=grids, block_indices=indices)
    count = sum(map(len, indices.values()))
    config = SMTConfig(target_modules=[*wanted], granularity="row", score="random", budget=count)
    return BlockSelection(grids, indices, count_parameters(model), config, base_name(model))
