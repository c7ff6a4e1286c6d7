"""Choose the rows of given tokens in the input embeddings, whatever their scores; special tokens, for example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.kinds import named_targets
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.selection.block_selection import BlockSelection, base_name
from smt_trainer.settings import is_int


def select_tokens(model: nn.Module, tokens: Iterable[int], beside: BlockSelection | None = None) -> BlockSelection:
    """Select the rows of tokens in a model's input embeddings, alone or beside other blocks.

    Give the result as `SMTConfig.selection`, or to `convert_to_smt`. Where the output embeddings are tied, the rows are
    theirs, too.

    Args:
        model: plain, with `get_input_embeddings`.
        tokens: their ids, such as `tokenizer.convert_tokens_to_ids(...)`.
        beside: the blocks to train besides, such as those of `BlockScores.select`; its configuration stays.

    Raises:
        SMTError: a token is not in the vocabulary, the embeddings cannot be trained, or `beside` has blocks of another
            shape in them.
    """
    embeddings = model.get_input_embeddings()  # pyrefly: ignore[not-callable]  # a model of transformers has it
    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    rows = list(dict.fromkeys(tokens))
    config = SMTConfig(target_modules=[name], granularity="row", score="random", budget=max(1, len(rows)))
    grid = target_grids(find_targets(model, config), config)[name]
    outside = [row for row in rows if not is_int(row) or not 0 <= row < grid.out_features]
    if outside or not rows:
        raise SMTError(
            f"tokens must be ids from 0 to {grid.out_features - 1}, the rows of `{name}`, got "
            f"{outside[0] if outside else 'none'!r}. For new tokens, call model.resize_token_embeddings first."
        )
    chosen = np.stack([np.sort(np.array(rows, np.int64)), np.zeros(len(rows), np.int64)], axis=1)
    if beside is None:
        return BlockSelection({name: grid}, {name: chosen}, count_parameters(model), config, base_name(model))
    if beside.grids.get(name, grid) != grid:
        raise SMTError(
            f"the selection has blocks of {'x'.join(map(str, beside.grids[name].block_shape))} in `{name}`, and tokens "
            "are whole rows. Leave the embeddings out of its target_modules, or choose rows (granularity='row')."
        )
    grids = {**beside.grids, name: grid}
    indices = beside.block_indices | {
        name: np.unique(np.concatenate([beside.block_indices.get(name, chosen), chosen]), axis=0)
    }
    order = [one for one in named_targets(model) if one in grids]
    return replace(
        beside,
        grids={one: grids[one] for one in order},
        block_indices={one: indices[one] for one in order if one in indices},
    )
