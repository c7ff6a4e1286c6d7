"""What a rewritten model may have learned beside its blocks, and its delta holds whole.

    named        what its configuration trains whole, and what loading made up
    statistics   the persistent buffers that forward has changed
    unfrozen     the parameters that require a gradient though rewriting has frozen them: a loop, a callback or a script
                 has let them be trained

Whatever else has changed since the blocks were taken is not in the delta, and named.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import is_sharded
from smt_trainer.sparse.convert import changed_statistics, get_state, stored_whole
from smt_trainer.sparse.fingerprint import sample, saved_tensors
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


def changed_base(model: nn.Module) -> list[str]:
    """Return the names of the base's tensors that have other values than when the blocks were taken, and that the delta
    does not hold; none where tensors are spread over ranks, since finding out would gather them all."""
    # First: a state dict has FSDP2 shard again what a forward has gathered.
    learned = {id(tensor) for tensor in held_whole(model).values()}
    learned |= {id(linear.parameter) for _, linear in smt_linears(model)}
    tensors, state = dict(saved_tensors(model)), get_state(model)
    if any(map(is_sharded, tensors.values())):
        return []
    found = state.base.differences(
        tensors,
        lambda name, stride, rows: sample(tensors[name], stride, rows),
        quantised=state.quantization is not None,
    )
    return [name for name in found if id(tensors.get(name)) not in learned]


def warn_of_others(model: nn.Module) -> None:
    """Say what has changed beside the blocks: what the delta holds, which makes it large, and what it does not hold."""
    if lost := changed_base(model):
        logger.warning(
            "%d frozen tensors, such as `%s`, have other values than when the blocks were taken: loaded, cast or "
            "written since. The delta does not hold them, so it does not give this model back. Save the model whole "
            "(save_pretrained), or change it before its blocks are taken.",
            len(lost),
            lost[0],
        )
    if found := sorted(unfrozen(model)):
        logger.warning(
            "The delta holds %d tensors whole, such as `%s`, since they require a gradient though the blocks were to "
            "be trained alone. If they are not trained, freeze them (requires_grad=False).",
            len(found),
            found[0],
        )
