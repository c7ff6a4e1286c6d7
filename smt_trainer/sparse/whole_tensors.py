"""Find what a rewritten model may have learned in addition to its blocks, which its delta holds whole.

    named        what its configuration trains whole, and what was newly initialised
    statistics   the persistent buffers that forward has changed
    unfrozen     the parameters that require a gradient though rewriting froze them: a loop, a callback or a script
                 has unfrozen them

Anything else that has changed since the blocks were taken is not in the delta; a warning names it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smt_trainer.model.fingerprint import saved_tensors
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import is_sharded
from smt_trainer.model.whole import stored_whole
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import changed_statistics, get_state

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WholeTensors:
    """The tensors that the delta of a rewritten model holds whole.

    Attributes:
        tensors: full name -> tensor; tied ones once.
        statistics: full names of the buffers that forward has changed.
        unfrozen: full names of the parameters that the user has unfrozen, without weights with blocks, which never
            learn.
    """

    tensors: dict[str, Tensor]
    statistics: set[str]
    unfrozen: set[str]

    @classmethod
    def of(cls, model: nn.Module) -> WholeTensors:
        """Find the tensors; a collective when the model is sharded. Raise `SMTError` if it trains no blocks."""
        named, statistics = get_state(model).whole, changed_statistics(model)
        state = model.state_dict(keep_vars=True)
        known = {id(tensor) for tensor in stored_whole(state, named).values()}
        known |= {id(tensor) for _, linear in block_modules(model) for tensor in (linear.blocks, linear.parameter)}
        trained = [(plain_name(name), one) for name, one in model.named_parameters() if one.requires_grad]
        unfrozen = {name for name, one in trained if id(one) not in known}
        return cls(stored_whole(state, [*named, *statistics, *unfrozen]), statistics, unfrozen)

    @property
    def unnamed(self) -> set[str]:
        """Full names of the tensors that the configuration does not name."""
        return self.statistics | self.unfrozen


def changed_outside(model: nn.Module, held: WholeTensors) -> list[str]:
    """Return the names of the base's tensors that have changed since the blocks were taken and that the delta does not
    hold; none if tensors are sharded over ranks, since finding out would gather them all."""
    # Tensors that FSDP2 gathered in a forward are sharded again: making the state dict for `held` did this.
    tensors, state = dict(saved_tensors(model)), get_state(model)
    if any(map(is_sharded, tensors.values())):
        return []
    learned = {id(tensor) for tensor in held.tensors.values()}
    learned |= {id(linear.parameter) for _, linear in block_modules(model)}
    found = state.fingerprint.differences_in(model, quantised=state.quantization is not None)
    return [name for name in found if id(tensors.get(name)) not in learned]


def warn_of_others(model: nn.Module, held: WholeTensors) -> None:
    """Warn of changes outside the blocks: those that the delta lacks, and those that make it large."""
    if lost := changed_outside(model, held):
        logger.warning(
            "%d frozen tensors, such as `%s`, have other values than when the blocks were taken: loaded, cast or "
            "written since. The delta does not hold them, so it cannot restore this model. Save the model whole "
            "(save_pretrained), or make such changes before the blocks are taken.",
            len(lost),
            lost[0],
        )
    if under := [name for name, linear in block_modules(model) if linear.parameter.requires_grad]:
        logger.warning(
            "%d weights with blocks, such as that of `%s`, require a gradient, but only their blocks are trained. To "
            "train them whole, name them in modules_to_save.",
            len(under),
            under[0],
        )
    if found := sorted(held.unfrozen):
        logger.warning(
            "The delta holds %d tensors whole, such as `%s`, because they require a gradient although only the blocks "
            "should be trained. If they are not trained, freeze them (requires_grad=False).",
            len(found),
            found[0],
        )
