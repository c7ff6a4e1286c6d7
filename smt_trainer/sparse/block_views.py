"""Views of a dense weight at the places of its blocks: whole blocks, or the parts of them that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from smt_trainer.model.sharded import LocalPart

if TYPE_CHECKING:
    from smt_trainer.sparse.block_module import BlockModule


class BlockViews(NamedTuple):
    """Views of a dense weight, through which the blocks are written.

    Attributes:
        addresses: data pointers of the weight's parts; the views are valid as long as these stay the same.
        views: one for each block, or for each part of a block.
        cuts: for each view, its block and the rows and columns of the block that lie in it; None if all are whole.
    """

    addresses: list[int]
    views: list[Tensor]
    cuts: list[tuple[int, slice, slice]] | None

    @classmethod
    def of(cls, module: BlockModule, parts: Sequence[LocalPart]) -> BlockViews:
        """Cut the parts that this rank holds of a module's weight."""
        addresses, indices = _addresses(parts), module.block_indices.tolist()
        if not module.is_divided:
            return cls(addresses, module.grid.views(module.weight.detach(), indices), None)
        br, bc = module.grid.block_shape
        # The matrices of a 3-D parameter count as one above the other.
        above = (module.stacked[0] if module.stacked else 0) * module.grid.stored_shape[0]
        views, cuts = [], []
        for values, row, column in parts:
            row -= above
            if module.grid.transposed:
                values, row, column = values.t(), column, row
            for block, (r, c) in enumerate(indices):
                top, left = row - r * br, column - c * bc
                rows = slice(max(top, 0), min(top + values.shape[0], br))
                columns = slice(max(left, 0), min(left + values.shape[1], bc))
                if rows.start < rows.stop and columns.start < columns.stop:
                    views.append(values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left])
                    cuts.append((block, rows, columns))
        return cls(addresses, views, cuts)

    def are_of(self, parts: Sequence[LocalPart]) -> bool:
        """Return whether the views are still those of these parts."""
        return self.addresses == _addresses(parts)

    def parts_of(self, blocks: Tensor) -> list[Tensor]:
        """Return the part of `blocks` [n, br, bc] that belongs in each view."""
        whole = blocks.unbind(0)
        return list(whole) if self.cuts is None else [whole[block][rows, columns] for block, rows, columns in self.cuts]


def _addresses(parts: Sequence[LocalPart]) -> list[int]:
    return [part.values.data_ptr() for part in parts]
