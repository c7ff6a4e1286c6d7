"""Find matrices that a checkpoint stores as one tensor and transformers splits on loading, such as a fused q, k and v.

transformers describes this as a conversion of one tensor to several (`Chunk` or `Split` along dimension 0). The rows of
a tensor are contiguous in its file, so each of the matrices can be read and written like a tensor of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from smt_trainer.merging.conversion import Loaded
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.names import find_names

# Operations of transformers that split a tensor.
SPLITS = ("Chunk", "Split")


def split_rows(
    loaded: Loaded, shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> dict[str, tuple[str, int, int]]:
    """Return what loading splits a tensor into: name -> key, first row and number of rows (`Checkpoint.fused`).

    It is empty if loading does something else, or the numbers of rows do not add up.

    Args:
        loaded: a tensor that loading converts.
        shapes: name of a tensor of the model -> its shape.
        checkpoint: the checkpoint that has the tensor.
    """
    converter = loaded.converter
    operation, *more = converter.operations
    if more or type(operation).__name__ not in SPLITS or operation.dim != 0:
        return {}
    first, *others = converter.target_patterns
    names = [loaded.name, *(loaded.name.replace(first, other) for other in others)]
    found = find_names(names, shapes)
    counts = [shapes[found[name]][0] for name in names if name in found]
    if len(counts) < len(names) or sum(counts) != checkpoint.tensors[loaded.key].shape[0]:
        return {}
    starts = itertools.accumulate(counts, initial=0)
    return {name: (loaded.key, start, count) for name, start, count in zip(names, starts, counts, strict=False)}
