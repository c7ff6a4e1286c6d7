"""Find the matrices of experts in the files of a checkpoint.

A model holds `mlp.experts.gate_up_proj` [E, 2I, H]. Some checkpoints store just this tensor. Many store each expert
separately, as `mlp.experts.7.gate_proj.weight` [I, H] and `mlp.experts.7.up_proj.weight`, often under other names;
loading concatenates the two and stacks the experts. transformers describes this as a conversion of names and tensors
(`transformers.conversion_mapping`, by model type), which is read here. Importing that takes a second, so it is done
only for experts that are stored separately.
"""

from __future__ import annotations

from typing import Any

from smt_trainer.errors import SMTError
from smt_trainer.merging.conversion import as_loaded
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.model.checkpoint import Checkpoint, parts_of
from smt_trainer.model.names import find_names

IN_MEMORY = "merge in memory instead: from_delta(delta, auto_class, base=...).save_pretrained(output)"


def find_experts(names: list[str], checkpoint: Checkpoint) -> dict[str, list[MatrixRows]]:
    """Return where the matrices of experts lie in a checkpoint.

    Args:
        names: names of the matrices, such as `model.layers.0.mlp.experts.gate_up_proj.7`.
        checkpoint: the base.

    Returns:
        Name -> its parts, from the first row on; without matrices that cannot be found.

    Raises:
        SMTError: loading the checkpoint does more to the experts than concatenate and stack them.
    """
    stack_of = {name: name.rpartition(".")[0] for name in names}
    stored = find_names(set(stack_of.values()), checkpoint.tensors)
    found = {name: [MatrixRows(stored[stack], 0, _number(name))] for name, stack in stack_of.items() if stack in stored}
    if len(found) == len(names):
        return found
    converted = _converted(checkpoint)
    stacks = find_names(set(stack_of.values()), {stack for stack, _ in converted})
    for name, stack in stack_of.items():
        keys = converted.get((stacks.get(stack, ""), _number(name)))
        if name not in found and keys:
            found[name], first = [], 0
            for _, key in sorted(keys):
                found[name].append(MatrixRows(key, first, None))
                first += checkpoint.tensors[key].shape[0]
    return found


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _converted(checkpoint: Checkpoint) -> dict[tuple[str, int], list[tuple[int, str]]]:
    """Return (name of a 3-D parameter, expert) -> the tensors that loading concatenates, each with its place in this
    order."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    transforms: list[Any] = []
    for part in parts_of(checkpoint.config or {}):
        transforms += get_checkpoint_conversion_mapping(str(part.get("model_type"))) or []
    found: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for key, stack, converter, place in as_loaded(checkpoint, transforms):
        if converter is None or len(converter.target_patterns) > 1:
            continue
        if not _only_stacks(converter):
            raise SMTError(
                f"loading {checkpoint.folder} changes `{key}` by {converter.operations} into `{stack}`, so the trained "
                f"blocks have no place in it; {IN_MEMORY}."
            )
        numbers = [int(part) for part in key.split(".") if part.isdecimal()]
        found.setdefault((stack, numbers[-1]), []).append((place, key))
    return found


def _only_stacks(converter: Any) -> bool:
    """Return whether a conversion only concatenates each expert's tensors, if several, and stacks the experts."""
    steps = [(type(one).__name__, one.dim) for one in converter.operations if hasattr(one, "dim")]
    stacks, puts_on_top = ("MergeModulelist", 0), ("Concatenate", 1)
    return len(steps) == len(converter.operations) and steps in ([stacks], [stacks, puts_on_top])
