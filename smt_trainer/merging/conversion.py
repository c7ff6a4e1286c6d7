"""How loading a checkpoint renames its tensors and puts them together, as transformers describes it.

Its descriptions need torch, which takes a second to import: callers wait for a name that the checkpoint lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from smt_trainer.model.checkpoint import Checkpoint


class Loaded(NamedTuple):
    """What loading makes of a tensor.

    Attributes:
        key: its name in the checkpoint.
        name: of the parameter that it becomes, or becomes a part of.
        converter: what changes it on the way (`WeightConverter`); None if only its name changes.
        place: which of the converter's sources it is.
    """

    key: str
    name: str
    converter: Any
    place: int


def as_loaded(checkpoint: Checkpoint, transforms: Iterable[Any]) -> Iterator[Loaded]:
    """Yield what loading makes of each tensor of a checkpoint.

    Args:
        checkpoint: on disk.
        transforms: renamings and converters, from `transformers.conversion_mapping`.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = list(transforms)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    sources = {pattern: (one, place) for one in converters for place, pattern in enumerate(one.source_patterns)}
    for key in checkpoint.tensors:
        name, pattern = rename_source_key(key, renamings, converters)
        converter, place = (None, 0) if pattern is None else sources[pattern]
        yield Loaded(key, name, converter, place)
