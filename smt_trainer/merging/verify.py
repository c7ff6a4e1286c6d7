"""Prove that a checkpoint is a base with a delta merged into it, value by value.

With B and M the bits of a tensor in the base and in the merged checkpoint, D the trained values and P their places,

    changed   values where M != B
    wrong     values in P where M != D
    outside   values outside of P where M != B: those changed in all, less those changed in P

the merge is right if wrong = outside = 0 in each tensor, the tensors are those of the base, in its dtypes and shapes
(apart from a resized vocabulary), and every other file has the content that merging writes (`merging/side_files.py`). A
tied tensor that the base stores twice must have the trained values under both names. How tensors are distributed over
files does not matter, nor do hidden files, files that trainers leave, and a README, which people may rewrite.

Both checkpoints are read once, a piece at a time, by threads: memory holds the delta and these pieces.

torch is imported only where `model/conversion.py` has to ask transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from smt_trainer.arrays import bits, cast
from smt_trainer.delta.folder import files_beside_weights
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.errors import SMTError
from smt_trainer.json_files import DAMAGE
from smt_trainer.merging.plan import MergePlan
from smt_trainer.merging.side_files import other_files
from smt_trainer.model.checkpoint import Checkpoint, find_checkpoint
from smt_trainer.tensor_file import map_bits

CHUNK = 2**20
MERGED = "merged checkpoint"
README = PurePath("README.md")


class Counts(NamedTuple):
    """Values of a tensor that the delta trains: all of them, those trained, and those that differ from the base."""

    values: int
    trained: int
    changed: int


@dataclass(frozen=True)
class Verification:
    """The result of comparing a merged checkpoint with its base and delta.

    Attributes:
        tensors: name of each tensor that the delta trains and the merged checkpoint has -> its counts.
        compared: number of tensors of the base; 0 if the merged checkpoint cannot be read.
        problems: (tensor or file, what is wrong with it); none if the merge is proven.
    """

    tensors: dict[str, Counts]
    compared: int
    problems: list[tuple[str, str]]


def verify_merge(
    base: str | Path,
    delta: str | Path,
    merged: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    onto: str | None = None,
) -> Verification:
    """Compare a merged checkpoint with what `merge_checkpoint` makes of the same base and delta.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        delta: folder or hub name of the delta.
        merged: folder of the merged checkpoint.
        base_revision: revision of a base on the hub.
        delta_revision: revision of a delta on the hub.
        onto: "original" if a delta of a quantised base was merged onto the weights that were quantised.

    Returns:
        What differs. A merged checkpoint that cannot be read counts as one problem.

    Raises:
        SMTError: the delta is damaged or belongs to another base; the base is damaged; there is no merged folder; or
            `onto` is missing or does not apply, or is "dequantized": no file holds the weights for such a merge.
    """
    merged = Path(merged)
    if onto == DEQUANTIZED:
        raise SMTError(
            "a merge onto='dequantized' cannot be verified: no file holds the dequantised weights to compare with. "
            "Merge again and compare the two with cmp; smt merge also says how far the logits are from the trained "
            "model's."
        )
    if not merged.is_dir():
        raise SMTError(f"no {MERGED} at {merged}: expected a folder. Check the path.")
    delta_folder = find_delta(delta, delta_revision)
    checkpoint = Checkpoint.open(find_checkpoint(base, base_revision))
    plan = MergePlan.load(delta_folder, checkpoint, onto)
    try:
        found = Checkpoint.open(merged, MERGED)
    except SMTError as error:
        return Verification({}, 0, [("weights", str(error))])
    tensors, problems = compare_tensors(checkpoint, plan, found)
    problems += _compare_files(checkpoint, plan, delta_folder, merged)
    return Verification(tensors, len(checkpoint.tensors), problems)


def compare_tensors(
    checkpoint: Checkpoint, plan: MergePlan, merged: Checkpoint
) -> tuple[dict[str, Counts], list[tuple[str, str]]]:
    """Compare the tensors of a merged checkpoint with base and delta, in whichever files they lie; return the counts of
    each tensor that the delta trains, and (tensor, what is wrong with it)."""
    tensors, problems = {}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compared = pool.map(lambda key: _compare(key, checkpoint, plan, merged), checkpoint.tensors)
        for key, (counts, problem) in zip(checkpoint.tensors, compared, strict=True):
            if counts is not None:
                tensors[key] = counts
            if problem:
                problems.append((key, problem))
    problems += [(key, "is not in the base") for key in merged.tensors if key not in checkpoint.tensors]
    return tensors, problems


def _compare(key: str, checkpoint: Checkpoint, plan: MergePlan, merged: Checkpoint) -> tuple[Counts | None, str | None]:
    """Return the counts of a tensor, if the delta trains it, and what is wrong with it, if anything."""
    before, after = checkpoint.tensors[key], merged.tensors.get(key)
    shape = plan.whole[key].shape if key in plan.whole else before.shape
    if after is None:
        return None, "is missing"
    if (after.dtype, after.shape) != (before.dtype, shape):
        return None, f"should be {before.dtype} of {list(shape)}, is {after.dtype} of {list(after.shape)}"
    old, new = map_bits(checkpoint.folder / before.file, before), map_bits(merged.folder / after.file, after)
    if key in plan.whole:
        trained = bits(cast(plan.whole[key], before.dtype)).reshape(-1)
        changed = count_differing(old, new) if len(old) == len(new) else len(new)
        return _judge(Counts(len(new), len(new), changed), changed, count_differing(new, trained))
    changed = count_differing(old, new)
    if key not in plan.sites:
        return None, f"is not trained, and {changed:,} of {len(new):,} values are not the base's" if changed else None
    count = changed_inside = wrong = 0
    for site in plan.sites[key]:
        trained = bits(cast(site.blocks, before.dtype))
        blocks_before, blocks = (site.take(values.reshape(shape)) for values in (old, new))
        count += trained.size
        changed_inside += int(np.count_nonzero(blocks != blocks_before))
        wrong += int(np.count_nonzero(blocks != trained))
    return _judge(Counts(len(new), count, changed), changed_inside, wrong)


def _judge(counts: Counts, changed_inside: int, wrong: int) -> tuple[Counts, str | None]:
    found, outside = [], counts.changed - changed_inside
    if wrong:
        still = " (it has the base's)" if not changed_inside else ""
        found.append(f"{wrong:,} of {counts.trained:,} trained values are not the delta's{still}")
    if outside:
        found.append(f"{outside:,} of {counts.values - counts.trained:,} other values are not the base's")
    return counts, " and ".join(found) or None


def count_differing(first: np.ndarray, second: np.ndarray) -> int:
    """Count the places at which two arrays of one length differ, reading them a piece at a time."""
    step = CHUNK // first.itemsize
    starts = range(0, len(first), step)
    return sum(int(np.count_nonzero(first[at : at + step] != second[at : at + step])) for at in starts)


def _compare_files(
    checkpoint: Checkpoint, plan: MergePlan, delta_folder: Path, merged: Path
) -> Iterator[tuple[str, str]]:
    """Yield the files other than weights that are not as merging writes them, and what is wrong with each."""
    expected = other_files(checkpoint, delta_folder, resized=plan.is_resized)
    expected.pop(README, None)
    found = set(files_beside_weights(merged)) - {README}
    for name, content in sorted(expected.items()):
        if name not in found:
            yield name.as_posix(), "is missing"
            continue
        wanted = content.encode() if isinstance(content, str) else content.read_bytes()
        if problem := _difference(wanted, (merged / name).read_bytes(), name.suffix):
            yield name.as_posix(), problem
    yield from ((name.as_posix(), "is from neither base nor training") for name in sorted(found - expected.keys()))


def _difference(wanted: bytes, found: bytes, suffix: str) -> str | None:
    """Return how a file differs from what it should be; JSON may be formatted differently."""
    if wanted == found:
        return None
    with contextlib.suppress(*DAMAGE):
        values, others = (json.loads(text) for text in (wanted, found)) if suffix == ".json" else (None, None)
        if isinstance(values, dict) and isinstance(others, dict):
            # As texts: NaN differs from itself.
            values, others = ({key: json.dumps(value) for key, value in each.items()} for each in (values, others))
            keys = sorted(key for key in values.keys() | others.keys() if values.get(key) != others.get(key))
            return f"has other values of {', '.join(keys)}" if keys else None
    return "is not as merging writes it"
