"""Tell whether the blocks or the weight that holds them have changed since both had the same values.

An operation on a tensor shows in its version. A change through `.data` (averages of weights that are put in for an
evaluation, an adapter that is merged) does not; then a checksum of the blocks tells on which side it was.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt_trainer.model.sharded import is_sharded

if TYPE_CHECKING:
    from smt_trainer.sparse.block_module import BlockModule


logger = logging.getLogger(__name__)


@dataclass
class LastEqual:
    """The state of a module when its weight last held the values of its blocks.

    Attributes:
        blocks: the parameter that held the blocks.
        version: its version; -1 if unknown.
        weight_version: the version of the weight.
        checksum: of the blocks; None if nobody has asked for it.
    """

    blocks: Tensor
    version: int
    weight_version: int
    checksum: int | None = None

    @classmethod
    def of(cls, module: BlockModule) -> LastEqual:
        """Return the present state of a module whose weight holds its blocks."""
        return cls(module.blocks, version_of(module.blocks), version_of(module.parameter))

    @classmethod
    def in_a_copy(cls, module: BlockModule) -> LastEqual:
        """Return the state of a copy, whose blocks count as changed."""
        return cls(module.blocks, -1, -1)

    def blocks_were_changed(self, module: BlockModule) -> bool:
        """Return whether an operation has changed the blocks."""
        return self.blocks is module.blocks and self.version != version_of(self.blocks)

    def weight_was_written(self, module: BlockModule) -> bool:
        """Return whether only the weight was written, by an operation; False for a stack of experts, which each of them
        writes, and for a weight of which this rank holds only parts."""
        is_known = self.has_same_blocks(module) and module.stacked is None and not module.is_divided
        return is_known and self.weight_version != version_of(module.parameter)

    def weight_was_edited(self, module: BlockModule) -> bool:
        """Return whether a weight that differs from the blocks does so because it was changed, and not the blocks."""
        if self.weight_was_written(module):
            return True
        return self.has_same_blocks(module) and self.checksum is not None and self.checksum == checksum(module)

    def has_same_blocks(self, module: BlockModule) -> bool:
        """Return whether the blocks are the same parameter, which no operation has changed."""
        return self.blocks is module.blocks and self.version == version_of(self.blocks)

    def note_checksum(self, module: BlockModule) -> None:
        """Compute the checksum, once, if this rank holds all blocks."""
        if self.checksum is None and not module.blocks.is_meta and not is_sharded(module.blocks):
            self.checksum = checksum(module)


@functools.cache
def warn_of_edits() -> None:
    """Warn, once, that a weight was changed from outside."""
    logger.warning(
        "A weight that holds blocks was changed from outside (by merging an adapter, or by clamping it, for example). "
        "Its blocks take over what lies in them. A delta lacks what lies outside of them: save such a model whole "
        "(save_pretrained). To train an adapter on top of blocks, merge the blocks first (merge_and_unload)."
    )


def checksum(module: BlockModule) -> int:
    """Return the sum of a module's blocks in the dtype of its weight, read as integers."""
    values = module.blocks.detach().to(module.parameter.dtype)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return int(values.view(integers).sum(dtype=torch.int64))


def version_of(tensor: Tensor) -> int:
    """Return how often operations have changed a tensor in place; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
