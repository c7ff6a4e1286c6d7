"""The chosen blocks of a model, which can be saved and reused. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.files import write_text
from smt_trainer.json_files import load_json, parse_json
from smt_trainer.manifest import check_format, check_keys, read_base, read_config, refusing_damage, sealed, unsealed
from smt_trainer.model.grid import BlockGrid, numel, read_grids
from smt_trainer.model.names import by_projection
from smt_trainer.settings import is_int

SELECTION_FILE = "smt_selection.json"
FORMAT = 1
KEYS = {"format", "base_model", "num_parameters", "config", "modules"}


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The chosen blocks of a model.

    Attributes:
        grids: module name -> grid, for every target, in the model's order.
        block_indices: module name -> [n, 2] int64 (row, column), row by row; only modules with chosen blocks. They may
            be given as tensors, and in any order.
        num_parameters: parameters of the whole model, tied weights counted once.
        config: the configuration that chose them.
        base_model: name of the model they were chosen for, if known.

    Raises:
        SMTError: there is no block, one has no grid or lies outside of it, or one is given twice.
    """

    grids: dict[str, BlockGrid]
    block_indices: dict[str, np.ndarray]
    num_parameters: int
    config: SMTConfig
    base_model: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.block_indices) - set(self.grids))
        if unknown:
            raise SMTError(f"the selection has blocks for `{unknown[0]}` but no grid; it is damaged, create it again.")
        arrays = {name: np.asarray(indices) for name, indices in self.block_indices.items()}
        for name, indices in arrays.items():
            self.grids[name].check_indices(indices, name)
        ordered = {name: indices[np.lexsort(indices.T[::-1])].astype(np.int64) for name, indices in arrays.items()}
        object.__setattr__(self, "block_indices", ordered)
        if not self.num_blocks:
            raise SMTError("the selection holds no block; there is nothing to train. Raise the budget.")

    @property
    def num_blocks(self) -> int:
        """Number of chosen blocks in all modules together."""
        return sum(len(indices) for indices in self.block_indices.values())

    @property
    def trainable_parameters(self) -> int:
        """Number of weights in the chosen blocks."""
        return sum(len(indices) * self.grids[name].block_numel for name, indices in self.block_indices.items())

    @property
    def fraction_of_model(self) -> float:
        """Trainable weights as a fraction of all parameters of the model (the papers' #Params%, as a fraction)."""
        return self.trainable_parameters / self.num_parameters

    @property
    def fraction_of_targets(self) -> float:
        """Trainable weights as a fraction of the targeted weights."""
        return self.trainable_parameters / numel(self.grids.values())

    def new_rows(self, name: str, count: int) -> range:
        """Return the rows of a module from row `count` on; an empty range unless the chosen blocks cover them all."""
        grid = self.grids.get(name)
        rows = range(count, grid.out_features if grid else count)
        return rows if rows and self.covers_rows(name, rows) else range(0)

    def covers_rows(self, name: str, rows: range) -> bool:
        """Return whether the chosen blocks of a module cover all of `rows`."""
        if name not in self.block_indices:
            return False
        grid = self.grids[name]
        counts = np.bincount(self.block_indices[name][:, 0], minlength=grid.shape[0])
        return bool((counts == grid.shape[1])[np.unique(np.array(rows) // grid.block_rows)].all())

    def blocks_by_projection(self) -> dict[str, int]:
        """Return projection (`v_proj`) -> number of chosen blocks, including projections without any."""
        return {
            projection: sum(len(self.block_indices.get(name, ())) for name in names)
            for projection, names in by_projection(self.grids).items()
        }

    def __repr__(self) -> str:
        return f"<BlockSelection in {self.base_model}: {self.summary()}>"

    def summary(self) -> str:
        """Describe the selection in one line: blocks and their shape, parameters, fractions, projections."""
        shapes = {grid.block_shape for grid in self.grids.values()}
        shape = "{}x{}".format(*shapes.pop()) if len(shapes) == 1 else "several shapes"
        shares = ", ".join(f"{leaf} {count}" for leaf, count in self.blocks_by_projection().items())
        return (
            f"{self.num_blocks:,} block{'s' * (self.num_blocks > 1)} of {shape} "
            f"({self.trainable_parameters:,} parameters): "
            f"{self.fraction_of_model:.3%} of the model, {self.fraction_of_targets:.3%} of the targets; {shares}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types that `from_dict` reads back."""
        config = self.config.to_dict() | {"selection": None}
        modules = {
            name: grid.to_dict()
            | {"block_indices": self.block_indices[name].tolist() if name in self.block_indices else []}
            for name, grid in self.grids.items()
        }
        return {
            "format": FORMAT,
            "base_model": self.base_model,
            "num_parameters": self.num_parameters,
            "config": config,
            "modules": modules,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockSelection:
        """Inverse of `to_dict`. Raises `SMTError` when a part is missing, malformed or out of range."""
        with refusing_damage("selection"):
            check_format(values, FORMAT, "selection")
            values = unsealed(values, "selection")
            check_keys(values, KEYS, "selection")
            grids = read_grids(values["modules"], values["num_parameters"])
            block_indices = {
                name: _read_indices(module["block_indices"], name)
                for name, module in values["modules"].items()
                if module["block_indices"] != []
            }
            return cls(grids, block_indices, values["num_parameters"], read_config(values), read_base(values))

    def save(self, path: str | Path) -> None:
        """Write the selection as JSON with a checksum, atomically."""
        write_text(Path(path), json.dumps(sealed(self.to_dict())))

    @classmethod
    def load(cls, path: str | Path) -> BlockSelection:
        """Read what `save` wrote: a file, or the smt_selection.json in a folder.

        A file that was written by hand needs no checksum.

        Raises:
            SMTError: the file is missing or damaged.
        """
        path = Path(path)
        return cls.from_dict(load_json(path / SELECTION_FILE if path.is_dir() else path, "selection", parse_json))

    @classmethod
    def resolve(cls, selection: BlockSelection | Mapping[str, Any] | str | Path) -> BlockSelection:
        """Return the selection, given as a `BlockSelection`, as its dictionary or as the path of its file or folder.

        Raises:
            SMTError: there is no such file, or it or the dictionary is damaged.
        """
        if isinstance(selection, BlockSelection):
            return selection
        return cls.from_dict(selection) if isinstance(selection, Mapping) else cls.load(selection)


def _read_indices(rows: Any, module: str) -> np.ndarray:
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 2 and all(map(is_int, row)) for row in rows
    ):
        raise SMTError(f"block_indices of `{module}` must be pairs of whole numbers. The selection is damaged.")
    return np.array(rows, np.int64)
