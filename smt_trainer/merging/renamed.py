"""Where the tensors lie that loading a checkpoint gives other names.

A model of images and text holds `model.language_model.layers.0...`, its checkpoint `language_model.model.layers.0...`:
transformers describes such renamings beside the conversions of experts, and applies those of the model's class and of
all models in it. Class and renamings need torch, so this waits for a name that the checkpoint lacks.
"""

from __future__ import annotations

from smt_trainer.errors import SMTError
from smt_trainer.merging.conversion import as_loaded
from smt_trainer.merging.parts import Part
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.names import find_names


def find_renamed(names: list[str], checkpoint: Checkpoint) -> dict[str, list[Part]]:
    """Return where weights lie that a checkpoint has under other names, by the names of linears and of the matrices of
    experts. Note the names in `checkpoint.renamed`."""
    checkpoint.renamed.update(_renamed(checkpoint))
    weights = find_names([f"{name}.weight" for name in names], checkpoint.renamed)
    found = {key.removesuffix(".weight"): [Part(checkpoint.renamed[other])] for key, other in weights.items()}
    # A name that ends in a number may be that of a linear in a list, too.
    numbers = {name: name.rpartition(".") for name in names if name not in found}
    stacks = find_names({stack for stack, _, _ in numbers.values()}, checkpoint.renamed)
    for name, (stack, _, number) in numbers.items():
        if stack in stacks and number.isdecimal():
            found[name] = [Part(checkpoint.renamed[stacks[stack]], 0, int(number))]
    return found


def _renamed(checkpoint: Checkpoint) -> dict[str, str]:
    """Return name in the model -> name in the checkpoint, of all tensors that loading renames and does not change."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from smt_trainer.model.skeleton import skeleton

    try:
        transforms = get_model_conversion_mapping(skeleton(checkpoint))
    except SMTError:  # a class of the user's own, of which nothing is known
        return {}
    loaded = as_loaded(checkpoint, transforms)
    return {name: key for key, name, converter, _ in loaded if converter is None and name != key}
