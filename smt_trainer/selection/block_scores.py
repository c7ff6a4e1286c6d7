"""The scores of all blocks, which can be saved so that another budget, scope or cap needs no second warm-up.

    smt_scores.safetensors   <module>  [R, C] float32, the scores of a module's blocks
                             and in its metadata the manifest: format, configuration, grids, name and number of
                             parameters of the model, checksum
    <module> > <module>      [n, 2] int32, with `train_dependents`: pairs of a row of the first module and a column of
                             the second that depends on it

The file holds 4 bytes a block: 96 KiB for the query, key and value projections of Llama-2-7B in blocks of 256x256,
2.3 MB for those of Llama-3.1-405B. It is plain data, the same on every machine and for every number of ranks.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.arrays import as_array, as_tensor
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.files import write_atomically
from smt_trainer.manifest import (
    check_keys,
    load_sealed,
    read_base,
    read_config,
    refusing_damage,
    sealed,
)
from smt_trainer.model.base import base_name
from smt_trainer.model.grid import BlockGrid, read_grids
from smt_trainer.model.kinds import fits_grid, named_targets, pick_targets
from smt_trainer.model.quantised import keep_differentiable
from smt_trainer.model.sharded import full_shape
from smt_trainer.model.targets import count_parameters, find_targets
from smt_trainer.scores import make_scorer
from smt_trainer.scores.collect import collect_scores
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.selection.candidates import Candidates, find_candidates
from smt_trainer.selection.choose import select_blocks
from smt_trainer.selection.dependencies import add_columns
from smt_trainer.selection.dependency_search import Dependency
from smt_trainer.selection.narrowing import narrowed, newly_excluded, wanted_targets
from smt_trainer.tensor_file import save_arrays

SCORES_FILE = "smt_scores.safetensors"
FORMAT = "1"
KEYS = {"format", "base_model", "num_parameters", "config", "modules", "readers", "unreached"}
MANIFEST = "smt_scores"
BETWEEN = " > "


@dataclass(frozen=True, eq=False)
class BlockScores:
    """The scores of all blocks of a model's targets.

    Attributes:
        grids: module name -> grid, for every target, in the model's order.
        scores: module name -> [R, C] float32 on the CPU.
        num_parameters: parameters of the whole model, tied weights counted once.
        config: the configuration that they were computed with.
        base_model: name of the model, if known.
        dependencies: the columns that depend on rows of the targets, with `train_dependents`.
        unreached: the targets without scores, because the warm-up did not reach them.

    Raises:
        SMTError: a module has a grid or scores, not both, or scores of another shape or dtype.
    """

    grids: dict[str, BlockGrid]
    scores: dict[str, Tensor]
    num_parameters: int
    config: SMTConfig
    base_model: str | None = None
    dependencies: list[Dependency] = field(default_factory=list)
    unreached: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.grids.keys() != self.scores.keys():
            odd = sorted(self.grids.keys() ^ self.scores.keys())[0]
            raise SMTError(f"the scores are damaged: `{odd}` has a grid or scores, not both. Score the blocks again.")
        for name, grid in self.grids.items():
            found = self.scores[name]
            if tuple(found.shape) != grid.shape or found.dtype != torch.float32:
                raise SMTError(
                    f"the scores of `{name}` should be float32 of shape {list(grid.shape)}, got {found.dtype} of shape "
                    f"{list(found.shape)}. They are damaged or belong to another grid; score the blocks again."
                )

    @classmethod
    def of(
        cls, model: nn.Module, config: SMTConfig, batches: Iterable[Mapping[str, Any]], seed: int = 0
    ) -> BlockScores:
        """Score the blocks of a model without a trainer; the model is left as it was.

        Args:
            model: a plain model whose output has a `loss`; dropout is active if the model is in training mode.
            config: what to score, and how; at most `smt_warmup_steps` batches are used.
            batches: keyword arguments of the model, labels included.
            seed: for the score 'random'.

        Raises:
            SMTError: the configuration does not fit the model, there is no batch, or bitsandbytes has repacked a
                weight (`keep_differentiable`).
        """
        keep_differentiable(model)
        candidates = find_candidates(model, config)
        targets = pick_targets(model, candidates.grids)
        scorer = make_scorer(targets, candidates.grids, config, seed)
        scores = collect_scores(model, scorer, itertools.islice(batches, config.smt_warmup_steps))
        return cls.of_candidates(candidates, scores, config, base_name(model))

    @classmethod
    def of_candidates(
        cls, candidates: Candidates, scores: dict[str, Tensor], config: SMTConfig, base_model: str | None
    ) -> BlockScores:
        """Combine candidates with the scores of their blocks."""
        grids = {name: grid for name, grid in candidates.grids.items() if name in scores}
        unreached = tuple(name for name in candidates.grids if name not in scores)
        return cls(grids, scores, candidates.num_parameters, config, base_model, candidates.dependencies, unreached)

    def select(self, config: SMTConfig | None = None) -> BlockSelection:
        """Return the highest-scoring blocks within a budget; see `select_blocks`.

        Args:
            config: default: that of the scores. Another one may differ in `budget`, `budget_of`, `scope`, `layer_cap`,
                `rank_cap`, and in `lowest_layer`, `target_modules` and `exclude_modules` if these leave fewer targets.

        Returns:
            The selection. Its configuration is that of the scores, except for the fields that decide targets, choice
            and training, which come from `config`.

        Raises:
            SMTError: `config` has another `score`, `block_size`, `granularity` or `train_dependents`, or asks for
                targets without scores; or as in `select_blocks`.
        """
        config = config or self.config
        names = narrowed(self.grids, self.config, config)
        chosen_by = {name: getattr(config, name) for name in SMTConfig.deciding("targets", "choice", "training")}
        selection = select_blocks(
            {name: self.scores[name] for name in names},
            {name: self.grids[name] for name in names},
            replace(self.config, selection=None, **chosen_by),
            self.num_parameters,
            self.base_model,
        )
        return add_columns(selection, self.dependencies, newly_excluded(self.config, config))

    def check_model(self, model: nn.Module, config: SMTConfig) -> None:
        """Raise `SMTError` unless these are scores of this plain model, and of all its targets under `config`."""
        everything = named_targets(model)
        for name, grid in self.grids.items():
            target = everything.get(name)
            shape = None if target is None else full_shape(target.weight)
            if target is None or shape != grid.stored_shape or not fits_grid(target, grid):
                wanted, found = ("x".join(map(str, size)) for size in (grid.stored_shape, shape or ["no such module"]))
                raise SMTError(
                    f"the scores of `{name}` are of a weight of {wanted}; this model has {found}. They were computed "
                    f"on {self.base_model or 'another model'}: load that, or score the blocks again."
                )
        if count_parameters(model) != self.num_parameters:
            raise SMTError(
                f"the scores were computed on {self.base_model or 'a model'} of {self.num_parameters:,} parameters; "
                f"this model has {count_parameters(model):,}. Load that model, or score the blocks again."
            )
        known = {*self.grids, *self.unreached, *(one.reader for one in self.dependencies)}
        missing = [name for name in find_targets(model, config) if name not in known]
        if missing:
            raise SMTError(
                f"{wanted_targets(config)} want {len(missing)} modules without scores, such as `{missing[0]}`. Narrow "
                "them, or score the blocks again."
            )

    def save(self, path: str | Path) -> None:
        """Write the scores and the manifest as one safetensors file, atomically."""
        manifest = {
            "format": FORMAT,
            "base_model": self.base_model,
            "num_parameters": self.num_parameters,
            "config": self.config.to_dict() | {"selection": None},
            "modules": {name: grid.to_dict() for name, grid in self.grids.items()},
            "unreached": list(self.unreached),
            "readers": {one.reader: one.grid.to_dict() for one in self.dependencies},
        }
        arrays = {name: as_array(found) for name, found in self.scores.items()}
        arrays |= {f"{one.source}{BETWEEN}{one.reader}": as_array(one.pairs) for one in self.dependencies}
        metadata = {"format": "pt", MANIFEST: json.dumps(sealed(manifest, arrays))}
        write_atomically(Path(path), lambda temporary: save_arrays(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> BlockScores:
        """Read what `save` wrote. Raises `SMTError` for a missing or damaged file, or one that holds something else."""
        path = Path(path)
        manifest, arrays = load_sealed(path, MANIFEST, FORMAT, "scores file")
        with refusing_damage(f"scores file at {path}"):
            tensors = {name: as_tensor(values) for name, values in arrays.items()}
            check_keys(manifest, KEYS, f"scores file at {path}")
            count, described = manifest["num_parameters"], manifest["modules"]
            grids = read_grids({**manifest["readers"], **described}, count)
            readers = {name: grids[name] for name in manifest["readers"]}
            grids = {name: grids[name] for name in described}
            dependencies = []
            for key in [key for key in tensors if BETWEEN in key]:
                source, _, reader = key.partition(BETWEEN)
                dependencies.append(Dependency(source, reader, tensors.pop(key), readers[reader]))
            unreached = tuple(map(str, manifest["unreached"]))
            scores = cls(grids, tensors, count, read_config(manifest), read_base(manifest), dependencies, unreached)
            scores._check_stored(readers)
            return scores

    def _check_stored(self, readers: Mapping[str, BlockGrid]) -> None:
        """Raise `SMTError` unless scores are finite and dependencies lie in the grids; `__post_init__` did the rest."""
        for name, found in self.scores.items():
            if not found.isfinite().all():
                raise SMTError(f"the scores of `{name}` are not finite. Score the blocks again.")
        for one in self.dependencies:
            source, pairs = self.grids.get(one.source), one.pairs
            are_pairs = pairs.dtype == torch.int32 and pairs.ndim == 2 and pairs.shape[1] == 2
            are_columns = one.grid.block_shape == one.grid.column_shape
            if (
                source is None
                or not (are_pairs and are_columns)
                or (pairs < 0).any()
                or (pairs >= torch.tensor((source.shape[0], one.grid.num_blocks))).any()
            ):
                raise SMTError(
                    f"the columns of `{one.reader}` that depend on rows of `{one.source}` do not lie in their grids. "
                    "The scores are damaged; score the blocks again."
                )
        found = {one.reader for one in self.dependencies}
        if not self.grids or found & self.grids.keys() or found != readers.keys():
            raise SMTError("the scores list no module, or readers that no dependency has. Score the blocks again.")
