"""Two checkpoints with the same tensors: a base, and a fine-tuned version of it. Imports no torch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smt_trainer.errors import SMTError
from smt_trainer.merging.verify import count_differing
from smt_trainer.model.checkpoint import Checkpoint, find_checkpoint
from smt_trainer.tensor_file import map_bits

TUNED = "fine-tuned checkpoint"


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tuned checkpoint, unquantised, that differ at most in values and sharding."""

    base: Checkpoint
    tuned: Checkpoint

    @classmethod
    def open(cls, base: str | Path, tuned: str | Path, revision: str | None) -> Pair:
        """Find two checkpoints on disk or on the hub.

        Raises:
            SMTError: one of them is quantised, or they differ in names, shapes or dtypes.
        """
        folders = find_checkpoint(base, revision), find_checkpoint(tuned, None, TUNED)
        pair = cls(Checkpoint.open(folders[0]), Checkpoint.open(folders[1], TUNED))
        for one in (pair.base, pair.tuned):
            if one.is_quantised:
                raise SMTError(f"{one.folder} is quantised; give the plain weights, of both checkpoints.")
        for key in {**pair.base.tensors, **pair.tuned.tensors}:
            pair._check_alike(key)
        return pair

    def tensors(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a tensor of the base and of the tuned checkpoint, read-only; the files stay mapped."""
        before, after = (one.array(one.tensors[key]) for one in (self.base, self.tuned))
        return before, after

    def differing(self) -> set[str]:
        """Return the names of the tensors that differ in any bit, reading both checkpoints once, by threads."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counts = pool.map(self._count_differing, self.base.tensors)
            return {key for key, count in zip(self.base.tensors, counts, strict=True) if count}

    def _count_differing(self, key: str) -> int:
        return count_differing(
            *(map_bits(one.folder / one.tensors[key].file, one.tensors[key]) for one in (self.base, self.tuned))
        )

    def _check_alike(self, key: str) -> None:
        ours, theirs = self.base.tensors.get(key), self.tuned.tensors.get(key)
        if ours is None or theirs is None:
            has, lacks = (self.base, self.tuned) if theirs is None else (self.tuned, self.base)
            raise SMTError(
                f"`{key}` is in {has.folder} and not in {lacks.folder}. Load both with the same class of transformers, "
                "and save them with save_pretrained."
            )
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise SMTError(
                f"`{key}` is {ours.dtype} of {list(ours.shape)} in {self.base.folder}, and {theirs.dtype} of "
                f"{list(theirs.shape)} in {self.tuned.folder}. Save both in one dtype (from_pretrained with dtype=, "
                "save_pretrained), with the same vocabulary and head."
            )
