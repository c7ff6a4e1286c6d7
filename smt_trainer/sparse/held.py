"""What a rewritten model may have learned beside its blocks, and its delta holds whole.

named        what its configuration trains whole, and what loading made up
statistics   the persistent buffers that forward has changed
unfrozen     the parameters that require a gradient though rewriting has frozen them: a loop, a callback or a script
             has let them be trained
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from smt_trainer.model.names import plain_name
from smt_trainer.sparse.convert import changed_statistics, get_state, stored_whole
from smt_trainer.sparse.linear import smt_linears

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def held_whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the delta of a rewritten model holds whole, by full name; tied ones once."""
    return stored_whole(model, [*get_state(model).whole, *held_unnamed(model)])


def held_unnamed(model: nn.Module) -> set[str]:
    """Return the full names of those of them that its configuration does not name."""
    return changed_statistics(model) | unfrozen(model)


def unfrozen(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that the user has unfrozen; the weights under blocks never learn."""
    known = {id(tensor) for tensor in stored_whole(model, get_state(model).whole).values()}
    known |= {id(tensor) for _, linear in smt_linears(model) for tensor in (linear.blocks, linear.parameter)}
    trained = [(plain_name(name), one) for name, one in model.named_parameters() if one.requires_grad]
    return {name for name, one in trained if id(one) not in known}


def warn_of_unfrozen(model: nn.Module) -> None:
    """Say which parameters the user has unfrozen, which makes a delta large."""
    if found := sorted(unfrozen(model)):
        logger.warning(
            "The delta holds %d tensors whole, such as `%s`, since they require a gradient though the blocks were to "
            "be trained alone. If they are not trained, freeze them (requires_grad=False).",
            len(found),
            found[0],
        )
