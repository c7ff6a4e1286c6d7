"""What of a model can be chosen from, once it is sure that a configuration fits it."""

from __future__ import annotations

from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.budget import check_budget_fits
from smt_trainer.selection.dependencies import Dependency, find_dependencies


def find_candidates(model: nn.Module, config: SMTConfig) -> tuple[dict[str, BlockGrid], list[Dependency]]:
    """The grids of a model's targets, by full module name, and what depends on their rows, if that is trained.

    Raises:
        SMTError: the configuration does not fit the model, or its budget is out of the targets' reach.
    """
    targets, dependencies = find_targets(model, config), []
    if config.train_dependents:
        dependencies = find_dependencies(model, config, targets)
    readers = dict.fromkeys(one.reader for one in dependencies)
    targets = {name: linear for name, linear in targets.items() if name not in readers}
    grids = target_grids(targets, config)
    find_whole(model, config, [*targets, *readers])
    check_budget_fits(grids, config, count_parameters(model))
    return grids, dependencies
