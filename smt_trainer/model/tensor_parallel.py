"""Handle linears whose weight transformers' tensor parallelism cuts over ranks (`DistributedConfig(tp_size=...)`).

Each rank holds a slice of W [O, I]: rows where the model's `tp_plan` says "colwise", columns where it says "rowwise".
All ranks see the same batch. Let L be the extent of each slice, s the start of this rank's slice, and e the edge of a
block in that direction. Either e divides L, and a slice holds whole blocks, or L divides e, and it holds equal parts of
blocks. In both cases a slice has its own grid:

    min(e, L)    edge of the part of a block in the slice
    s mod e      where in its block the part begins

transformers replaces the `forward` of such a module on the instance, by one that splits inputs and combines outputs. A
copy of the module keeps the original's `forward`, which computes with the original's weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from smt_trainer.errors import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.sharded import first_of, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

INSTALLED_BY = "transformers.distributed.tensor_parallel"


class Slice(NamedTuple):
    """What this rank holds of a weight: `extent` rows (dimension 0) or columns (dimension 1), from `first` on."""

    dimension: int
    first: int
    extent: int

    @classmethod
    def of(cls, weight: DTensor) -> Slice:
        """Return this rank's slice of a weight that is sharded in one dimension."""
        (placement,) = weight.placements
        dimension: int = placement.dim % weight.ndim  # pyrefly: ignore[missing-attribute]  # it is a Shard
        return cls(dimension, first_of(weight)[dimension], weight.shape[dimension] // weight.device_mesh.size())

    def fits(self, grid: BlockGrid) -> bool:
        """Return whether the slice holds whole blocks of a grid, or equal parts of blocks."""
        edge = grid.block_shape[self.dimension]
        return self.extent % edge == 0 or edge % self.extent == 0

    def grid(self, grid: BlockGrid) -> BlockGrid:
        """Return the grid of the slice, from that of the whole weight."""
        if self.dimension == 0:
            return replace(grid, out_features=self.extent, block_rows=min(grid.block_rows, self.extent))
        return replace(grid, in_features=self.extent, block_columns=min(grid.block_columns, self.extent))

    def within_block(self, grid: BlockGrid) -> tuple[slice, slice]:
        """Return the rows and the columns of a block that lie in the slice."""
        parts = [slice(None), slice(None)]
        edge = grid.block_shape[self.dimension]
        parts[self.dimension] = slice(self.first % edge, self.first % edge + min(edge, self.extent))
        return parts[0], parts[1]

    def locate(self, grid: BlockGrid, block_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the blocks that lie in the slice, wholly or in part.

        Returns:
            Their positions [m] among the `block_indices` [n, 2], and their indices [m, 2] in the slice's own grid.
        """
        edge = grid.block_shape[self.dimension]
        starts = block_indices[:, self.dimension] * edge
        mine = np.flatnonzero((starts < self.first + self.extent) & (starts + edge > self.first))
        places = block_indices[mine].copy()
        places[:, self.dimension] = np.maximum(starts[mine] - self.first, 0) // min(edge, self.extent)
        return mine, places


def is_tensor_parallel(module: Any) -> bool:
    """Return whether transformers' tensor parallelism cuts the weight of a module and has replaced its `forward`."""
    forward = vars(module).get("forward") if isinstance(module, nn.Module) else None
    is_replaced = getattr(forward, "__module__", None) == INSTALLED_BY
    return is_replaced and hasattr(module, "weight") and is_dtensor(module.weight)


def refuse_copied(model: nn.Module) -> None:
    """Raise `SMTError` if a model is a copy of one whose weights tensor parallelism cuts."""
    for name, module in model.named_modules():
        if is_tensor_parallel(module) and not _computes_with_own_weight(module):
            raise SMTError(
                f"`{name}` of this copy of a model computes with the weight of the original, since tensor parallelism "
                "replaces the forward of the modules that it cuts. Load the model once more instead of copying it: "
                "from_pretrained(..., distributed_config=...)."
            )


def _computes_with_own_weight(module: nn.Module) -> bool:
    """Return whether the `forward` that replaces a module's own was made for this module, not for its original."""
    return any(cell.cell_contents is module for cell in vars(module)["forward"].__closure__ or ())


def why_no_slice(linear: Any) -> str | None:
    """Return why the slices of a linear cannot hold blocks; None if they can."""
    from torch.distributed.tensor import Shard

    weight = linear.weight
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, and under tensor parallelism only an nn.Linear can be tuned"
    if len(weight.placements) != 1 or type(weight.placements[0]) is not Shard:
        return f"tensor parallelism cuts its weight as {weight.placements}, neither by rows nor by columns"
    if weight.shape[weight.placements[0].dim] % weight.device_mesh.size():
        return f"tensor parallelism cuts its weight of {'x'.join(map(str, weight.shape))} into unequal slices"
    return None


def style_of(model: Any, name: str) -> Any:
    """Return the style in which transformers cuts a module. Raise `SMTError` if the model's plan does not have it."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    plan = getattr(model, "tp_plan", None) or {}
    style = plan.get(replace_layer_number_by_wildcard(name))
    if style is None:
        raise SMTError(f"`{name}` is cut over ranks, and the tp_plan of the {type(model).__name__} does not say how.")
    return ALL_PARALLEL_STYLES[style]


def refuse_unfitting(targets: Mapping[str, Any], grids: Mapping[str, BlockGrid]) -> None:
    """Raise `SMTError` if the slices of a target hold neither whole blocks of its grid nor equal parts of blocks."""
    for name, target in targets.items():
        if is_tensor_parallel(target) and not (held := Slice.of(target.weight)).fits(grids[name]):
            edge = grids[name].block_shape[held.dimension]
            raise SMTError(
                f"tensor parallelism cuts `{name}` into slices of {held.extent} {('rows', 'columns')[held.dimension]}, "
                f"which blocks with an edge of {edge} do not fit. Use block_size={math.gcd(edge, held.extent)}, or "
                "leave the module out with exclude_modules."
            )
