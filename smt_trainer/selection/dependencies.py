"""Find the columns of a linear that depend on rows of another, and add them to a selection of rows (SPSFT's `dep`).

Let y be the output of a linear A at all tokens and x the input of a linear B. Row i of A and column j of B depend on
each other if x_j is 0 at every token whenever y_i is, whatever all other outputs are. Column j then reads only what row
i computes. Structured pruning uses the same dependency: removing the row leaves the column nothing to multiply. In
Llama, row i of `gate_proj` and of `up_proj` go with column i of `down_proj`, and row i of `v_proj` goes with one column
of `o_proj` for each query head of its group. A row of `q_proj` or `k_proj` affects all columns of its head but
determines none. The residual stream adds other outputs to a row's output, so it determines no column there.

Convolutions have channels in place of features, and positions in place of tokens. Their columns are the weights that
read an input channel (`model/convolution.py`). Batch normalisation turns a channel of zeros into another constant, so
the search replaces it by the identity: in a ResNet, channel i of the first convolution of a bottleneck goes with input
channel i of the second. The norm's own two parameters per channel are not added; `train_norm` trains them.

The search runs the model (`dependency_search.py`).
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from smt_trainer.config import TARGET_KEYWORDS, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import is_convolution
from smt_trainer.model.kinds import named_targets
from smt_trainer.model.names import is_excluded
from smt_trainer.model.sharded import full_shape
from smt_trainer.model.targets import ALL_CONVOLUTIONS, find_targets
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.dependency_search import Dependency, all_dependencies

logger = logging.getLogger(__name__)


def find_dependencies(model: nn.Module, config: SMTConfig, targets: Iterable[str]) -> list[Dependency]:
    """Find the dependencies of a model's targets; leave the model and the random state unchanged.

    A target whose columns depend on rows of another gives no rows itself, since a weight has only one grid. The log
    says so, as a warning if `target_modules` names modules.

    Args:
        model: a plain model that takes token ids or pixels.
        config: columns of the modules that it excludes are not trained.
        targets: names of the linears to choose rows from.

    Returns:
        The dependencies by source and reader, in the model's order. No reader is a source.

    Raises:
        SMTError: the model takes other inputs or is sharded over ranks, or no column depends on the targets.
    """
    _refuse_unsuited(model)
    targets, kept = set(targets), []
    sources, readers = set(), set()
    everything = named_targets(model)
    keywords = {ALL_CONVOLUTIONS if is_convolution(everything[name]) else "all-linear" for name in targets}
    tunable = {name for word in keywords for name in find_targets(model, replace(config, target_modules=word))}
    for one in all_dependencies(model):
        if one.source in targets - readers and one.reader in tunable - sources:
            sources.add(one.source)
            readers.add(one.reader)
            kept.append(one)
    if not kept:
        raise SMTError(
            f"train_dependents=True, but no column depends on the rows of target_modules={config.target_modules!r}. "
            "Leave it at False, or target modules such as value or up projections."
        )
    both = sorted({name.rpartition(".")[2] for name in targets & readers})
    if both:
        level = logging.INFO if config.target_modules in TARGET_KEYWORDS else logging.WARNING
        message = "%s: only columns that depend on rows of other targets are trained, and no rows (train_dependents)."
        logger.log(level, message, ", ".join(both))
    return kept


def add_columns(
    selection: BlockSelection, dependencies: Iterable[Dependency], excluded: str | list[str] | None = None
) -> BlockSelection:
    """Add to a selection of rows the columns that depend on them, except those of excluded modules.

    The budget covers the rows alone, as in SPSFT (section 4.3), which halves the ratio to make room for the columns.
    """
    grids, columns = dict(selection.grids), {}
    for one in dependencies:
        if one.source in selection.grids and not is_excluded(one.reader, excluded):
            grids[one.reader] = one.grid
            rows, readers = one.pairs.numpy().astype(np.int64).T
            chosen = selection.block_indices.get(one.source, np.empty((0, 2), np.int64))[:, 0]
            columns.setdefault(one.reader, []).append(readers[np.isin(rows, chosen)])
    block_indices = dict(selection.block_indices)
    for name, parts in columns.items():
        chosen = np.unique(np.concatenate(parts))
        if len(chosen):
            block_indices[name] = np.stack(np.unravel_index(chosen, grids[name].shape), axis=1)
    return replace(selection, grids=grids, block_indices=block_indices)


def _refuse_unsuited(model: nn.Module) -> None:
    takes = getattr(model, "main_input_name", "input_ids")
    if takes not in ("input_ids", "pixel_values"):
        raise SMTError(
            f"train_dependents=True runs the model on token ids or pixels, but {type(model).__name__} takes {takes}. "
            "Leave it at False."
        )
    if any(full_shape(parameter) != tuple(parameter.shape) for parameter in model.parameters()):
        raise SMTError(
            "train_dependents=True runs the model before training, but its parameters are sharded over ranks. Choose "
            "the blocks on one process, with SMTTrainer.select, and pass them as SMTConfig.selection."
        )
