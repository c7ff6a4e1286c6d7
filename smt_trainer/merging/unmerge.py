"""Take a delta out of a merged checkpoint: copy its files, then write the base's values where the delta has its own.

A delta holds trained values, not differences, so neither it nor the merged checkpoint has the values from before. They
are read from the base (all of which is read once, to prove that the checkpoint is base plus delta). To do without the
base later, keep the reverse delta instead, which is as small as the delta:

    smt extract MERGED BASE back      the delta that turns the merged checkpoint back into the base
    smt merge MERGED back OUT         later, without the base

torch is imported only where `model/conversion.py` has to ask transformers.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.errors import SMTError
from smt_trainer.files import new_folder
from smt_trainer.merging.merge import check_outside, copying, open_both
from smt_trainer.merging.plan import MergePlan
from smt_trainer.merging.side_files import copy_of_base
from smt_trainer.merging.verify import MERGED, compare_tensors
from smt_trainer.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def unmerge(
    base: str | Path,
    delta: str | Path,
    merged: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    onto: str | None = None,
) -> Path:
    """Write the base that a delta was merged into, bit for bit, in the files of the merged checkpoint.

    The files other than weights are the base's.

    Args:
        base: folder or hub name of the base, which holds the values that the delta replaced.
        delta: folder or hub name of the delta.
        merged: folder of the merged checkpoint.
        output: folder to make; it appears whole or not at all.
        base_revision: revision of a base on the hub.
        delta_revision: revision of a delta on the hub.
        onto: "original" if a delta of a quantised base was merged onto the weights that were quantised.

    Returns:
        The output folder.

    Raises:
        SMTError: as in `merge_checkpoint`; the merged checkpoint is not base plus delta, or `onto` is "dequantized".
            Nothing is written.
    """
    merged, output = Path(merged), Path(output)
    if onto == DEQUANTIZED:
        raise SMTError(
            "a merge onto='dequantized' replaced every quantised weight, so nothing of the base is left in it. "
            "Use the base itself."
        )
    checkpoint, delta_folder = open_both(base, delta, output, base_revision, delta_revision)
    check_outside(output, merged)
    found = Checkpoint.open(merged, MERGED)
    plan = MergePlan.load(delta_folder, checkpoint, onto)
    _, problems = compare_tensors(checkpoint, plan, found)
    if problems:
        (where, problem), others = problems[0], len(problems) - 1
        raise SMTError(
            f"{merged} is not {checkpoint.folder} with the delta merged into it: `{where}` {problem}"
            f"{f', and {others} other tensors' if others else ''}. Run smt verify for details, and give the base and "
            "delta that were merged."
        )
    originals = _originals(plan, checkpoint, found)
    with new_folder(output) as stage, copying(found, stage) as copies:
        for number, (name, copy) in enumerate(copies.items(), 1):
            copy.result()
            originals.write(stage / name)
            logger.info("%s has the base's values again (%d of %d).", name, number, len(copies))
        copy_of_base(checkpoint, stage)
        if found.index is not None:
            (stage / found.index).write_bytes((merged / found.index).read_bytes())
        _prove(originals, checkpoint, stage)
    return output


def _originals(plan: MergePlan, checkpoint: Checkpoint, merged: Checkpoint) -> MergePlan:
    """Return the plan that writes the base's values at the places of a delta into copies of the merged files."""

    def weight(key: str) -> np.ndarray:
        return checkpoint.array(plan.tensors[key])

    sites = {key: [replace(site, blocks=site.take(weight(key))) for site in found] for key, found in plan.sites.items()}
    return replace(
        plan,
        sites=sites,
        whole={key: weight(key) for key in plan.whole},
        tensors={key: merged.tensors[key] for key in plan.tensors},
    )


def _prove(originals: MergePlan, checkpoint: Checkpoint, stage: Path) -> None:
    """Raise `SMTError` unless a folder has the fingerprint of the delta's base, as `checkpoint` was found to have."""
    loaded = replace(Checkpoint.open(stage), conversions=checkpoint.conversions).loaded
    if differing := originals.delta.fingerprint.differences_on_disk(stage, loaded):
        raise SMTError(
            f"`{differing[0]}` was written with other values than the base's. Was a file changed meanwhile? Run again."
        )
