"""Find tensors of a checkpoint that transformers renames on loading.

A vision-language model holds `model.language_model.layers.0...`, its checkpoint `language_model.model.layers.0...`:
transformers describes such renamings along with the conversions of experts, and applies those of the model's class and
of all models in it. This imports torch, so it is done only for a name that the checkpoint lacks.
"""

from __future__ import annotations

from smt_trainer.errors import SMTError
from smt_trainer.merging.conversion import as_loaded
from smt_trainer.merging.fused import split_rows
from smt_trainer.merging.matrix_rows import MatrixRows
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.names import find_names


def find_renamed(names: list[str], checkpoint: Checkpoint) -> dict[str, list[MatrixRows]]:
    """Return name of a linear or an expert's matrix -> where its weight lies in a checkpoint under another name. Fill
    `checkpoint.renamed` and `checkpoint.fused`."""
    _look_up(checkpoint)
    located = {name: MatrixRows(key) for name, key in checkpoint.renamed.items()}
    for name, (key, first, count) in checkpoint.fused.items():
        located[name] = MatrixRows(key, among=(first, count))
    weights = find_names([f"{name}.weight" for name in names], located)
    found = {key.removesuffix(".weight"): [located[other]] for key, other in weights.items()}
    # A name that ends in a number may also be that of a linear in a `ModuleList`.
    numbers = {name: name.rpartition(".") for name in names if name not in found}
    stacks = find_names({stack for stack, _, _ in numbers.values()}, checkpoint.renamed)
    for name, (stack, _, number) in numbers.items():
        if stack in stacks and number.isdecimal():
            found[name] = [MatrixRows(checkpoint.renamed[stacks[stack]], 0, int(number))]
    return found


def _look_up(checkpoint: Checkpoint) -> None:
    """Record in a checkpoint which of its tensors loading only renames or splits."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from smt_trainer.model.skeleton import skeleton

    try:
        model = skeleton(checkpoint)
    except SMTError:  # a class that transformers does not have
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for loaded in as_loaded(checkpoint, get_model_conversion_mapping(model)):
        if loaded.converter is not None:
            checkpoint.fused.update(split_rows(loaded, shapes, checkpoint))
        elif loaded.name != loaded.key:
            checkpoint.renamed[loaded.name] = loaded.key
