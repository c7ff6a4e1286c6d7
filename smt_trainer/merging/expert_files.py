"""Find the matrices of experts in the files of a checkpoint.

A model holds `mlp.experts.gate_up_proj` [E, 2I, H]. Some checkpoints store just this tensor. Many store each expert
separately, and loading stacks them (`model/conversion.py`).
"""

from __future__ import annotations

from smt_trainer.errors import SMTError
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.conversion import look_up
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
        SMTError: loading the checkpoint does more to the experts than concatenate and stack them, such as cast some.
    """
    stack_of = {name: name.rpartition(".")[0] for name in names}
    stacks, known = dict.fromkeys(stack_of.values()), look_up(checkpoint)
    for stack, name in find_names(stacks, known.changed).items():
        raise SMTError(
            f"loading {checkpoint.folder} changes `{stack}` by {known.changed[name]}, so the trained blocks have no "
            f"place in it; {IN_MEMORY}."
        )
    whole = checkpoint.names
    whole_names, stacked_names = find_names(stacks, whole), find_names(stacks, known.stacked)
    found = {}
    for name, stack in stack_of.items():
        number = int(name.rpartition(".")[2])
        if stack in whole_names:
            found[name] = [MatrixRows(whole[whole_names[stack]], 0, number)]
        elif stack in stacked_names and number < len(known.stacked[stacked_names[stack]]):
            keys = known.stacked[stacked_names[stack]][number]
            rows = [checkpoint.tensors[key].shape[0] for key in keys]
            found[name] = [MatrixRows(key, sum(rows[:place])) for place, key in enumerate(keys)]
    return found
