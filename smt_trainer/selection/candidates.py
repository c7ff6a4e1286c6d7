"""Find the candidate blocks of a model, and check that a configuration fits it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from smt_trainer.config import SMTConfig
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.budget import check_budget_fits
from smt_trainer.selection.dependencies import find_dependencies
from smt_trainer.selection.dependency_search import Dependency


@dataclass(frozen=True)
class Candidates:
    """The blocks that can be chosen, by their grids.

    Attributes:
        grids: module name -> grid, for every target, in the model's order.
        dependencies: the columns that depend on rows of the targets, with `train_dependents`.
        num_parameters: parameters of the whole model, tied weights counted once.
    """

    grids: dict[str, BlockGrid]
    num_parameters: int
    dependencies: list[Dependency] = field(default_factory=list)


def find_candidates(model: nn.Module, config: SMTConfig, dependencies: list[Dependency] | None = None) -> Candidates:
    """Return the candidates of a plain model.

    Args:
        model: may be on the meta device.
        config: what to choose from, and how much.
        dependencies: the model's, if they are known already; otherwise they are searched for with `train_dependents`.

    Raises:
        SMTError: the configuration does not fit the model, or the targets cannot hold its budget.
    """
    targets = find_targets(model, config)
    if not config.train_dependents:
        dependencies = []
    elif dependencies is None:
        dependencies = find_dependencies(model, config, targets)
    readers = dict.fromkeys(one.reader for one in dependencies)
    targets = {name: linear for name, linear in targets.items() if name not in readers}
    grids = target_grids(targets, config)
    find_whole(model, config, [*targets, *readers])
    num_parameters = count_parameters(model)
    check_budget_fits(grids, config, num_parameters)
    return Candidates(grids, num_parameters, dependencies)
