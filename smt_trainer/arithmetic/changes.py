"""What differs between two checkpoints of a model: which tensors, which blocks, by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from smt_trainer.arithmetic.change_norms import block_norms, change_norm, differing_blocks
from smt_trainer.arithmetic.pair import Pair
from smt_trainer.config import SMTConfig
from smt_trainer.delta.delta import Delta
from smt_trainer.errors import SMTError
from smt_trainer.model.fingerprint import Fingerprint, persistent_buffers, saved_tensors
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import find_names
from smt_trainer.model.skeleton import skeleton
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.choose import select_blocks


@dataclass(frozen=True)
class Changes:
    """What differs between two checkpoints of a model.

    Attributes:
        pair: the two checkpoints.
        model: their model, without values.
        grids: module name -> grid, for every target, in the model's order.
        keys: name of a parameter or persistent buffer of the model -> its name in both checkpoints; tied ones once.
        names: those of `keys` that differ.
    """

    pair: Pair
    model: nn.Module
    grids: dict[str, BlockGrid]
    keys: dict[str, str]
    names: list[str]

    @classmethod
    def of(cls, pair: Pair, config: SMTConfig) -> Changes:
        """Find the targets of the base's model, and the tensors that differ.

        Raises:
            SMTError: no target differs; or a tensor that differs, or a target, has another name in the model.
        """
        model = skeleton(pair.base)
        # Experts are left out: a checkpoint may hold other tensors for them than the model.
        linears = {name: one for name, one in find_targets(model, config).items() if isinstance(one, nn.Module)}
        grids = target_grids(linears, config)
        stored, differing = pair.base.tensors, pair.differing()
        own = dict.fromkeys(
            [name for name, _ in saved_tensors(model)] + [name for name, _ in persistent_buffers(model)]
        )
        keys = find_names(own, stored)
        tied = find_names([name for name, _ in model.named_parameters(remove_duplicate=False)], stored)
        unknown = [f"{name}.weight" for name in grids if f"{name}.weight" not in keys]
        unknown += sorted(differing - {*keys.values(), *tied.values()})
        if unknown:
            raise SMTError(
                f"`{unknown[0]}` is not in both {pair.base.folder} and its {type(model).__name__}, which renames "
                "tensors on loading. A delta and its base must agree on names, so none can be extracted."
            )
        names = [name for name, key in keys.items() if key in differing]
        if not any(f"{name}.weight" in names for name in grids):
            what = f"no target, only in other tensors such as `{names[0]}`" if names else "no value"
            raise SMTError(
                f"{pair.tuned.folder} differs from {pair.base.folder} in {what}, and a delta needs blocks of its "
                f"target_modules={config.target_modules!r}. Check the paths, or name other targets."
            )
        return cls(pair, model, grids, keys, names)

    @property
    def targets(self) -> list[str]:
        """Modules whose weights differ and have a grid."""
        return [name for name in self.grids if f"{name}.weight" in self.names]

    @property
    def others(self) -> list[str]:
        """Names of the other tensors that differ."""
        weights = {f"{name}.weight" for name in self.grids}
        return [name for name in self.names if name not in weights]

    def all_blocks(self, config: SMTConfig) -> BlockSelection:
        """Return the blocks that differ."""
        found = {name: np.argwhere(differing_blocks(self.grids[name], *self._weights(name))) for name in self.targets}
        config = replace(config, budget=sum(map(len, found.values())))
        return BlockSelection(self.grids, found, count_parameters(self.model), config)

    def largest(self, config: SMTConfig) -> BlockSelection:
        """Return the blocks of largest change within the budget, leaving out blocks without change."""
        norms = {name: np.zeros(grid.shape) for name, grid in self.grids.items()} | self._norms
        scores = {name: torch.from_numpy(found).float() for name, found in norms.items()}
        selection = select_blocks(scores, self.grids, config, count_parameters(self.model))
        changed = {name: found[norms[name][tuple(found.T)] > 0] for name, found in selection.block_indices.items()}
        return replace(selection, block_indices={name: found for name, found in changed.items() if len(found)})

    def delta(self, selection: BlockSelection, whole: list[str]) -> Delta:
        """Return the delta with the tuned values of some blocks and whole tensors."""
        blocks = {
            name: self.grids[name].split(self._weights(name)[1])[tuple(found.T)]
            for name, found in selection.block_indices.items()
        }
        # As in training, the fingerprint leaves out parameters that the delta holds whole.
        left_out = {name for name, _ in self.model.named_parameters() if name in whole}
        named = [name for name, _ in saved_tensors(self.model) if name in self.keys]
        tensors = {name: self.pair.base.tensors[self.keys[name]] for name in named}
        dtype = tensors[f"{next(iter(blocks))}.weight"].dtype
        fingerprint = Fingerprint.read(self.pair.base.folder, tensors, dtype, left_out)
        arrays = {name: np.array(self.pair.tensors(self.keys[name])[1]) for name in whole}
        return Delta(selection, blocks, arrays, fingerprint, dtype, type(self.model).__name__, sorted(whole))

    def left(self, delta: Delta) -> tuple[float, dict[str, float]]:
        """Return what a delta leaves of the change (see `extract.py`), in all, and in each tensor not covered."""
        all_of, left = {}, {}
        for name, norms in self._norms.items():
            squares = norms**2
            all_of[f"{name}.weight"] = squares.sum()
            if name in delta.block_arrays:
                squares[tuple(delta.selection.block_indices[name].T)] = 0
            left[f"{name}.weight"] = squares.sum()
        for name in self.others:
            all_of[name] = change_norm(*self.pair.tensors(self.keys[name])) ** 2
            left[name] = 0.0 if name in delta.whole_arrays else all_of[name]
        total = sum(all_of.values())
        shares = {name: math.sqrt(left[name] / all_of[name]) for name in left if left[name]}
        return math.sqrt(sum(left.values()) / total) if total else 0.0, shares

    @cached_property
    def _norms(self) -> dict[str, np.ndarray]:
        """Return module name -> norms [R, C] of the changes of its blocks, for `targets`."""
        found = {name: block_norms(self.grids[name], *self._weights(name)) for name in self.targets}
        for name, norms in found.items():
            if not np.isfinite(norms).all():
                raise SMTError(f"the change of `{name}` is not finite: a checkpoint has NaN or infinite values there.")
        return found

    def _weights(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        return self.pair.tensors(self.keys[f"{module}.weight"])
