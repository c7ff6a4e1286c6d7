"""Make a delta from two checkpoints: what any fine-tuning changed, in blocks.

With D_b the change of block b of the targets, a delta without a budget takes every block that differs in any bit, and
whole every other tensor that differs: merged onto the base, it gives the tuned checkpoint bit for bit, which is proven
before the delta appears. With a budget it takes the blocks of largest norm |D_b|, which of all choices of as many
blocks leaves the least; the rest stays as in the base. What is left of the change, of all tensors or of one, is

    left = sqrt(sum of |D|^2 over what is not taken / sum of |D|^2 over all)

Memory holds the delta and pieces of the two checkpoints; the model is built without values, to know its targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smt_trainer.arithmetic.changes import Changes
from smt_trainer.arithmetic.pair import Pair
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.files import check_new, new_folder
from smt_trainer.merging.merge import check_outside
from smt_trainer.merging.plan import MergePlan
from smt_trainer.merging.side_files import copy_to_delta
from smt_trainer.merging.verify import compare_tensors
from smt_trainer.model.hub import at_commit
from smt_trainer.selection.block_selection import BlockSelection

# Fields of a configuration that say where blocks may lie and how large they are.
FIELDS = [*SMTConfig.deciding("targets"), "block_size", "granularity"]


@dataclass(frozen=True)
class Extraction:
    """The result of extracting a delta.

    Attributes:
        selection: the blocks of the delta.
        whole: names of the tensors that it holds whole.
        is_exact: whether merging is proven to give the fine-tuned checkpoint bit for bit: always without a budget, and
            with one that covers all that changed.
        left: what is left of the change of all tensors together, from 0 to 1; see the top of this file.
        left_of: name of a tensor that is not taken completely -> what is left of its change.
    """

    selection: BlockSelection
    whole: list[str]
    is_exact: bool
    left: float
    left_of: dict[str, float]

    def __str__(self) -> str:
        lines = [self.selection.summary()]
        if self.whole:
            lines.append(f"whole: {len(self.whole)} tensors, such as `{self.whole[0]}`")
        if self.is_exact:
            lines.append("merged onto the base, it gives the fine-tuned checkpoint bit for bit")
        if not self.left_of:
            return "\n".join(lines)
        worst = max(self.left_of, key=lambda name: self.left_of[name])
        lines.append(
            f"{self.left:.2%} of the change is left (Frobenius norm), in {len(self.left_of)} tensors; most in `{worst}`"
            f": {self.left_of[worst]:.2%} of its own"
        )
        return "\n".join(lines)


def extract_delta(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    *,
    budget: float | int | dict[str, float | int] | None = None,
    base_revision: str | None = None,
    **fields: Any,
) -> Extraction:
    """Write the delta that turns a base into a fine-tuned checkpoint, or comes nearest to it within a budget.

    The delta is like one of training, with the base's fingerprint: merge, load, inspect, export or train it further. It
    records the score "magnitude", here of the change, and the base's hub name or the name of its folder. Tokenizer,
    chat template, generation settings and configuration are copied from the fine-tuned checkpoint.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        finetuned: folder or hub name of a checkpoint with the base's tensors in other values.
        output: folder to make; it appears whole or not at all.
        budget: as in SMTConfig; None takes all that differs.
        base_revision: revision of a base on the hub.
        fields: of SMTConfig, such as `block_size`, `granularity` and `target_modules`, here "all-linear" by default;
            and, with a budget, those that decide how it is spent, such as `scope`.

    Returns:
        What was taken, and what is left.

    Raises:
        SMTError: the checkpoints differ in names, shapes or dtypes, agree in all targets, or are quantised; the
            base's class is not in transformers or renames tensors on loading; the fields do not fit the model; or a
            value is not finite. Nothing is written.
    """
    output = Path(output)
    taken = ["budget", *FIELDS] if budget is None else [*SMTConfig.deciding("choice"), *FIELDS]
    if other := sorted(fields.keys() - {*taken}):
        without = " without a budget" if budget is None else ""
        raise SMTError(f"{other[0]} has no effect on extracting{without}; give some of {', '.join(taken)}.")
    check_new(output)
    pair = Pair.open(base, finetuned, base_revision)
    check_outside(output, pair.base.folder, pair.tuned.folder)
    chosen = fields if budget is None else fields | {"budget": budget}
    config = SMTConfig.from_dict({"target_modules": "all-linear", "score": "magnitude", "modules_to_save": []} | chosen)
    changes = Changes.of(pair, config)
    selection = changes.all_blocks(config) if budget is None else changes.largest(config)
    selection = replace(selection, base_model=_name(base, pair))
    delta = changes.delta(selection, changes.others if budget is None else [])
    left, left_of = (0.0, {}) if budget is None else changes.left(delta)
    with new_folder(output) as stage:
        delta.save(stage)
        copy_to_delta(pair.tuned.folder, stage)
        problems = _differences(pair, stage) if left == 0 else []
        if budget is None and problems:
            where, problem = problems[0]
            raise SMTError(
                f"no delta turns {pair.base.folder} into {pair.tuned.folder}: after merging, `{where}` {problem}. If "
                "it is tied to another tensor in the base and no longer in the fine-tuned checkpoint, untie it in both."
            )
    return Extraction(selection, list(delta.whole_arrays), left == 0 and not problems, left, left_of)


def _name(base: str | Path, pair: Pair) -> str:
    """Return the name of a base that a delta records: its folder's, or that on the hub with the commit."""
    folder = pair.base.folder
    return folder.resolve().name if Path(base).is_dir() else at_commit(str(base), folder.name)


def _differences(pair: Pair, stage: Path) -> list[tuple[str, str]]:
    """Return the tensors in which base plus delta differs from the tuned checkpoint in any bit, and how."""
    return compare_tensors(pair.base, MergePlan.load(stage, pair.base), pair.tuned)[1]
