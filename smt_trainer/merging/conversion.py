"""Find out how transformers renames, splits and combines the tensors of a checkpoint on loading.

This imports torch, which takes a second, so it is called only for a name that the checkpoint lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from smt_trainer.model.checkpoint import Checkpoint


class Loaded(NamedTuple):
    """A tensor of a checkpoint and what it becomes on loading.

    Attributes:
        key: its name in the checkpoint.
        name: the parameter that it becomes, or becomes a part of; the first if it is split.
        converter: the `WeightConverter` that changes it; None if at most its name changes.
        place: its index among the converter's source patterns.
    """

    key: str
    name: str
    converter: Any
    place: int


def as_loaded(checkpoint: Checkpoint, transforms: Iterable[Any]) -> Iterator[Loaded]:
    """Yield what each tensor of a checkpoint becomes on loading.

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
