"""Cut weights into blocks.

A weight W of `nn.Linear` is [O, I] (out features x in features). A grid of blocks of br x bc weights cuts it into
R = O / br block rows and C = I / bc block columns; block (r, c) is W[r*br:(r+1)*br, c*bc:(c+1)*bc]. The paper's
sub-matrices have br = bc = 256; an SPSFT row is a block of 1 x I, an SPSFT column a block of O x 1.

GPT-2's `Conv1D` stores W^T [I, O]. Its grid is `transposed` and cuts the view W of that parameter, so everywhere else
rows are out features and columns are in features. A convolution stores [O, I/g, *kernel], which is cut as a matrix
(`convolution.py`). An embedding's weight is [V, H], tokens x features. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError, printable
from smt_trainer.settings import is_int

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_AUTO_EDGE = 256
SMALLEST_AUTO_EDGE = 16
# Bounds for what a file can claim.
MOST_PARAMETERS, LONGEST_NAME = 10**14, 1000


@dataclass(frozen=True)
class BlockGrid:
    """The grid of one [out_features, in_features] weight; `transposed` if the weight is stored as [in, out].

    A convolution's weight, with this `kernel` and `groups`, is stored as [O, I/g, *kernel]. In an `embedding`, the
    out features are tokens.

    Raises:
        SMTError: the block does not divide the weight, or the kernel or the groups do not.
    """

    out_features: int
    in_features: int
    block_rows: int
    block_columns: int
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    groups: int = 1
    embedding: bool = False

    def __post_init__(self) -> None:
        if (
            min(*self.block_shape, *self.weight_shape) < 1
            or self.out_features % self.block_rows
            or self.in_features % self.block_columns
        ):
            raise SMTError(
                f"a block of {self.block_rows}x{self.block_columns} does not divide a weight of "
                f"{self.out_features}x{self.in_features}."
            )
        if (
            min((*self.kernel, self.groups)) < 1
            or (self.groups > 1 and not self.kernel)
            or (self.transposed and self.kernel)
            or self.out_features % self.groups
            or self.in_features % math.prod(self.kernel)
        ):
            raise SMTError(
                f"a weight of {self.out_features}x{self.in_features} cannot belong to a convolution with a kernel "
                f"of {list(self.kernel)} in {self.groups} groups."
            )

        if self.embedding and (self.transposed or self.kernel):
            raise SMTError("a weight is an embedding's, a Conv1D's or a convolution's, and not two of these.")

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that holds the weight: (O, I), (I, O) where transposed, or (O, I/g, *kernel)."""
        if self.kernel:
            return self.out_features, self.in_features // math.prod(self.kernel), *self.kernel
        return self.weight_shape[::-1] if self.transposed else self.weight_shape

    @property
    def stored_columns(self) -> int:
        """Weights in a row of the parameter, taken as a matrix."""
        return self.out_features if self.transposed else self.in_features

    @property
    def block_shape(self) -> tuple[int, int]:
        """(br, bc)."""
        return self.block_rows, self.block_columns

    @property
    def column_shape(self) -> tuple[int, int]:
        """Shape of the block that reads one input feature or channel: (O, 1), or (O/g, weights in a kernel)."""
        return self.out_features // self.groups, math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C): block rows and block columns."""
        return self.out_features // self.block_rows, self.in_features // self.block_columns

    @property
    def num_blocks(self) -> int:
        """R * C."""
        return self.shape[0] * self.shape[1]

    @property
    def block_numel(self) -> int:
        """Weights in one block, br * bc."""
        return self.block_rows * self.block_columns

    def touched(self, block_indices: np.ndarray) -> tuple[int, int]:
        """Return how many rows and how many columns of the weight the blocks at `block_indices` [n, 2] touch. The
        smaller of the two bounds the rank of a change in these blocks."""
        rows, columns = (len(np.unique(lines)) for lines in block_indices.T)
        return rows * self.block_rows, columns * self.block_columns

    def lines_within(self, rank_cap: int) -> tuple[int, int]:
        """Return how many block rows, and how many block columns, fit within `rank_cap` rows or columns."""
        rows, columns = self.shape
        return min(rows, rank_cap // self.block_rows), min(columns, rank_cap // self.block_columns)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types that `from_dict` reads back."""
        values: dict[str, Any] = {
            "weight_shape": list(self.weight_shape),
            "block_shape": list(self.block_shape),
            "transposed": self.transposed,
        }
        if self.kernel:
            values |= {"kernel": list(self.kernel), "groups": self.groups}
        return values | ({"embedding": True} if self.embedding else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockGrid:
        """Inverse of `to_dict`; ignores other keys. Raises `SMTError` for anything but whole numbers."""
        sizes, transposed = [*values["weight_shape"], *values["block_shape"]], values.get("transposed", False)
        kernel, groups = values.get("kernel", []), values.get("groups", 1)
        embedding = values.get("embedding", False)
        if len(sizes) != 4 or not all(is_int(size) for size in sizes) or not isinstance(transposed, bool):
            raise SMTError(
                f"a grid must have four whole numbers and a boolean `transposed`, got {sizes} and {transposed!r}. The "
                "file is damaged; create it again."
            )
        if not isinstance(embedding, bool):
            raise SMTError(f"`embedding` of a grid must be true or false, got {embedding!r}. The file is damaged.")
        if not isinstance(kernel, list) or len(kernel) > 3 or not all(is_int(size) for size in [*kernel, groups]):
            raise SMTError(
                "the kernel of a grid must be up to three whole numbers and its groups a whole number, got "
                f"{kernel!r} and {groups!r}. The file is damaged; create it again."
            )
        return cls(*sizes, transposed=transposed, kernel=tuple(kernel), groups=groups, embedding=embedding)

    def split(self, weight: Any) -> Any:
        """Return a view [R, C, br, bc] of a weight of `stored_shape`, a tensor or a numpy array. Writing to the view
        writes to the weight, unless the weight is a convolution's and not contiguous."""
        rows, columns = self.shape
        weight = weight.T if self.transposed else weight
        return weight.reshape(rows, self.block_rows, columns, self.block_columns).swapaxes(1, 2)

    def views(self, weight: Tensor, block_indices: list[list[int]]) -> list[Tensor]:
        """Return a view [br, bc] of each block at `block_indices` (row, column) of a weight of `stored_shape`."""
        blocks = self.split(weight)
        return [blocks[row, column] for row, column in block_indices]

    def gather(self, weight: Tensor, block_indices: Tensor) -> Tensor:
        """Copy the blocks [n, br, bc] at `block_indices` [n, 2] of a weight of `stored_shape`."""
        rows, columns = block_indices.to(weight.device).long().unbind(1)
        return self.split(weight)[rows, columns]

    def scatter_(self, weight: Tensor, block_indices: Tensor, blocks: Tensor) -> None:
        """Write `blocks` [n, br, bc] at `block_indices` [n, 2] of a weight of `stored_shape`, in its dtype."""
        rows, columns = block_indices.to(weight.device).long().unbind(1)
        # A convolution's weight may be laid out with its channels last.
        whole = weight.contiguous() if self.kernel else weight
        self.split(whole)[rows, columns] = blocks.to(weight.device, weight.dtype)
        if whole is not weight:
            weight.copy_(whole)

    def check_indices(self, block_indices: np.ndarray, module: str) -> None:
        """Raise `SMTError` unless `block_indices` is an integer array [n, 2] of distinct blocks of this grid."""
        if block_indices.ndim != 2 or block_indices.shape[1] != 2 or block_indices.dtype.kind not in "iu":
            raise SMTError(
                f"block_indices of `{module}` must be integers of shape [n, 2], got {block_indices.dtype} of shape "
                f"{list(block_indices.shape)}. The selection or delta is damaged; create it again."
            )
        outside = ((block_indices < 0) | (block_indices >= self.shape)).any(1)
        if outside.any():
            raise SMTError(
                f"`{module}` has {self.shape[0]}x{self.shape[1]} blocks, but block "
                f"{tuple(block_indices[outside][0].tolist())} was asked for. The selection or delta is damaged or "
                "belongs to another model."
            )
        if not np.diff(np.sort(np.ravel_multi_index(tuple(block_indices.T), self.shape))).all():
            raise SMTError(f"block_indices of `{module}` name a block twice. The selection or delta is damaged.")


def numel(grids: Iterable[BlockGrid]) -> int:
    """Count the weights of all grids together."""
    return sum(grid.num_blocks * grid.block_numel for grid in grids)


def read_grids(modules: Mapping[str, Mapping[str, Any]], num_parameters: int) -> dict[str, BlockGrid]:
    """Return the grids that a manifest describes, by module name.

    Raises:
        SMTError: a grid or a name is malformed, or the grids have more weights than the model has parameters. So a
            damaged file cannot make its reader allocate more memory than a model of the stated size takes.
    """
    grids = {name: BlockGrid.from_dict(module) for name, module in modules.items()}
    weights = numel(grids.values())
    if not is_int(num_parameters) or not weights <= num_parameters <= MOST_PARAMETERS:
        raise SMTError(
            f"the grids cover {weights:,} weights of a model of {num_parameters!r} parameters; expected at most as "
            "many. The file is damaged; create it again."
        )
    for name in grids:
        if not name or len(name) > LONGEST_NAME or printable(name) != name:
            raise SMTError(f"a module is called {name[:100]!r}, which is no valid module name. The file is damaged.")
    return grids


def make_grids(shapes: Mapping[str, tuple[int, int]], config: SMTConfig) -> dict[str, BlockGrid]:
    """Make one grid per module from the weights' shapes (O, I) and the config's `granularity` and `block_size`.

    Raises:
        SMTError: the block size does not divide a weight, or 'auto' finds no size of at least 16.
    """
    if config.granularity == "row":
        return {name: BlockGrid(out, into, 1, into) for name, (out, into) in shapes.items()}
    if config.granularity == "column":
        return {name: BlockGrid(out, into, out, 1) for name, (out, into) in shapes.items()}
    if isinstance(config.block_size, tuple):
        rows, columns = config.block_size
    elif isinstance(config.block_size, int):
        rows = columns = config.block_size
    else:
        rows = columns = auto_block_size(shapes)
    grids = {}
    for name, (out, into) in shapes.items():
        if out % rows or into % columns:
            common = common_block_size(shapes)
            raise SMTError(
                f"`{name}` is {out}x{into}; block_size={config.block_size!r} does not divide it. Use "
                f"block_size='auto' ({common} here) or exclude the module."
            )
        grids[name] = BlockGrid(out, into, rows, columns)
    return grids


def common_block_size(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the largest common divisor of all dimensions that is at most 256."""
    common = math.gcd(*(dimension for shape in shapes.values() for dimension in shape))
    return max(divisor for divisor in range(1, min(common, LARGEST_AUTO_EDGE) + 1) if common % divisor == 0)


def auto_block_size(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return `common_block_size`, but refuse less than 16: such blocks cost more in bookkeeping than they save.

    Raises:
        SMTError: the size is below 16; names the modules whose dimensions are not multiples of 16.
    """
    edge = common_block_size(shapes)
    if edge >= SMALLEST_AUTO_EDGE:
        return edge
    odd = [
        f"`{name}` ({out}x{into})"
        for name, (out, into) in shapes.items()
        if out % SMALLEST_AUTO_EDGE or into % SMALLEST_AUTO_EDGE
    ]
    raise SMTError(
        f"block_size='auto' found {edge} as the largest common divisor of the targeted dimensions; at least "
        f"{SMALLEST_AUTO_EDGE} is expected. Not multiples of {SMALLEST_AUTO_EDGE}: {', '.join(odd[:4]) or 'none alone'}"
        f"{' and others' if len(odd) > 4 else ''}. Exclude them with exclude_modules or set block_size yourself."
    )
