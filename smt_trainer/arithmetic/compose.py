"""Add up what several deltas change in one base (`weighted_sum.py`). Imports no torch.

Blocks of different shapes are cut into common ones (`refine.py`). The result is a delta like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smt_trainer.arithmetic.refine import on_one_grid
from smt_trainer.arithmetic.weighted_sum import Terms
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.onto import check_onto, in_words
from smt_trainer.errors import SMTError
from smt_trainer.files import new_folder
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.merging.merge import check_outside, open_both
from smt_trainer.merging.plan import MergePlan, refuse_grown
from smt_trainer.merging.side_files import copy_to_delta
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.names import list_projections
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.tensor_header import StoredTensor


@dataclass(frozen=True)
class Composition:
    """The result of composing deltas.

    Attributes:
        selection: the blocks of the composed delta.
        shared: module -> number of its blocks that more than one delta trains.
        shared_whole: tensors that more than one delta holds whole.
    """

    selection: BlockSelection
    shared: dict[str, int]
    shared_whole: list[str]

    def __str__(self) -> str:
        touching = []
        blocks, whole = sum(self.shared.values()), self.shared_whole
        if blocks:
            touching.append(f"{blocks:,} block{'s' * (blocks > 1)}, in {list_projections(self.shared)}")
        if whole:
            touching.append(f"{len(whole)} whole tensor{'s, such as' if whole[1:] else ','} `{whole[0]}`")
        where = f"overlap in {' and in '.join(touching)}" if touching else "share nothing"
        return f"{self.selection.summary()}\nthe deltas {where}"


def compose_deltas(
    base: str | Path,
    deltas: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    base_revision: str | None = None,
) -> Composition:
    """Write the delta that changes a base by the weighted sum of what several deltas change.

    Tokenizer, chat template, generation settings and configuration are copied from the first delta's folder.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        deltas: folders or hub names of one or more deltas.
        output: folder to make; it appears whole or not at all.
        weights: a factor for the changes of each delta; 1 by default.
        mean: divide the sum by the number of deltas.
        base_revision: revision of a base on the hub.

    Returns:
        The blocks of the composed delta, and where the deltas overlap.

    Raises:
        SMTError: as in `merge_checkpoint`; the deltas belong to different bases, model classes or dtypes, or to a
            quantised base; one trains blocks of what another holds whole; the sum needs the base's values of a tensor
            that is new in the model or has other rows in the base; or `weights` is not one finite number for each
            delta. Nothing is written.
    """
    factors, output = _checked(weights, len(deltas)), Path(output)
    folders = [find_delta(delta) for delta in deltas]
    checkpoint, _ = open_both(base, folders[0], output, base_revision, None)
    check_outside(output, *folders)
    loaded = [Delta.load(folder) for folder in folders]
    _check_alike(loaded, folders, checkpoint)
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[MatrixRows]] = {}
    for delta, folder in zip(loaded, folders, strict=True):
        plan = MergePlan.of(delta, folder, checkpoint)
        refuse_grown(plan, "composed")
        tensors |= {name: plan.tensors[key] for name, key in plan.keys.items()}
        parts |= plan.parts
    terms = Terms(on_one_grid(loaded), factors, len(loaded) if mean else 1, checkpoint, tensors, parts)
    composed, shared, shared_whole = terms.compose()
    with new_folder(output) as stage:
        composed.save(stage)
        copy_to_delta(folders[0], stage)
    return Composition(composed.selection, shared, shared_whole)


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the factor of each delta. Raise `SMTError` unless there is a finite weight for each."""
    factors = [1.0] * count if weights is None else list(weights)
    if not count or len(factors) != count or not all(map(math.isfinite, factors)):
        raise SMTError(f"expected one or more deltas, and a finite weight for each; got {count} deltas and {weights}.")
    return factors


def _check_alike(deltas: list[Delta], folders: list[Path], checkpoint: Checkpoint) -> None:
    """Raise `SMTError` unless all deltas change one plain model in one dtype, each weight in blocks or whole."""
    for delta, folder in zip(deltas, folders, strict=True):
        if delta.quantization is not None:
            raise SMTError(
                f"the delta in {folder} was trained on a quantised base ({in_words(delta.quantization)}), and only "
                "quantising that base again would tell what training changed. Merge it --onto original, and extract "
                "a delta of the result (smt extract)."
            )
        check_onto(delta, None, is_quantised=checkpoint.is_quantised)
        for what in ("weight_dtype", "architecture"):
            ours, theirs = getattr(deltas[0], what), getattr(delta, what)
            if ours != theirs:
                raise SMTError(
                    f"the delta in {folders[0]} has {what} {ours!r}, the one in {folder} {theirs!r}. Extract "
                    "both again from their merged checkpoints (smt merge, smt extract)."
                )
    blocked = {name: folder for delta, folder in zip(deltas, folders, strict=True) for name in delta.block_arrays}
    for delta, folder in zip(deltas, folders, strict=True):
        for name in delta.whole_arrays:
            module = name.removesuffix(".weight")
            if module != name and module in blocked:
                raise SMTError(
                    f"the delta in {folder} holds `{name}` whole, and the one in {blocked[module]} has blocks of it. "
                    "Extract both again from their merged checkpoints (smt merge, smt extract), with it as a target."
                )
