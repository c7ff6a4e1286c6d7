"""Find out how transformers renames, splits, stacks and otherwise changes the tensors of a checkpoint on loading.

It describes this by model class and model type (`transformers.conversion_mapping`). Examples:

    renamed    `language_model.model.layers.0...` becomes `model.language_model.layers.0...`
    split      a fused q, k and v becomes three matrices (`Chunk` or `Split` along dimension 0)
    stacked    `mlp.experts.7.gate_proj.weight` [I, H] and `mlp.experts.7.up_proj.weight` become a part of
               `mlp.experts.gate_up_proj` [E, 2I, H]: concatenated by rows, then stacked by experts
    changed    anything else, such as a transposition

The rows of a tensor are contiguous in its file, so all but the last can be read and written in place. Importing
transformers takes a second, so it is asked only about checkpoints that lack a name, hold experts, or seem to have other
values than expected.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from smt_trainer.errors import SMTError
from smt_trainer.model.checkpoint import Checkpoint, Conversions, parts_of
from smt_trainer.model.fingerprint import Fingerprint
from smt_trainer.model.names import expert_index, find_names

# Operations of transformers that split a tensor.
SPLITS = ("Chunk", "Split")

Shapes = Mapping[str, tuple[int, ...]]


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


def look_up(checkpoint: Checkpoint) -> Conversions:
    """Return `checkpoint.conversions`, filled."""
    found = checkpoint.conversions
    if found.are_known:
        return found
    found.are_known = True
    transforms, shapes = _transforms(checkpoint)
    stacked: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for loaded in as_loaded(checkpoint, transforms):
        if loaded.converter is None:
            # A class of its own may not share the renamings of its model type.
            if loaded.name != loaded.key and shapes:
                found.renamed[loaded.name] = loaded.key
        elif split := split_rows(loaded, shapes, checkpoint):
            found.fused.update(split)
        elif _only_stacks(loaded.converter):
            of_expert = stacked.setdefault(loaded.name, {}).setdefault(expert_index(loaded.key), [])
            of_expert.append((loaded.place, loaded.key))
        elif not _keeps_shape(loaded, shapes, checkpoint):
            found.changed[loaded.name] = str(loaded.converter.operations)
    for name, experts in stacked.items():
        keys = [[key for _, key in sorted(experts[number])] for number in sorted(experts)]
        parts = [checkpoint.tensors[key] for of_expert in keys for key in of_expert]
        dtypes, dimensions = {part.dtype for part in parts}, {len(part.shape) for part in parts}
        if len(dtypes) > 1:
            found.changed[name] = f"a cast of {', '.join(sorted(dtypes))} to one dtype"
        elif sorted(experts) == list(range(len(experts))) and dimensions == {2}:
            found.stacked[name] = keys
        else:
            found.changed[name] = "stacking other parts than a matrix or two of each expert"
    return found


def differences(fingerprint: Fingerprint, checkpoint: Checkpoint) -> list[str]:
    """Return the names of a base's tensors that have other values in a checkpoint, also as transformers loads it."""
    found = fingerprint.differences_on_disk(checkpoint.folder, checkpoint.loaded)
    if found and not checkpoint.conversions.are_known:
        look_up(checkpoint)
        found = fingerprint.differences_on_disk(checkpoint.folder, checkpoint.loaded)
    return found


def _transforms(checkpoint: Checkpoint) -> tuple[list[Any], Shapes]:
    """Return the conversions of a checkpoint, and name of a tensor of its model -> its shape. If transformers does not
    have the model's class, the conversions are those of its model types, and there are no shapes."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping

    from smt_trainer.model.skeleton import skeleton

    try:
        model = skeleton(checkpoint)
    except SMTError:
        types = [str(part.get("model_type")) for part in parts_of(checkpoint.config or {})]
        return [one for kind in types for one in get_checkpoint_conversion_mapping(kind) or []], {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return get_model_conversion_mapping(model), shapes


def as_loaded(checkpoint: Checkpoint, transforms: Iterable[Any]) -> Iterator[Loaded]:
    """Yield what each tensor of a checkpoint becomes on loading.

    Args:
        checkpoint: on disk.
        transforms: renamings and converters, from `transformers.conversion_mapping`.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = list(transforms)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    sources = {pattern: (one, place) for one in converters for place, pattern in enumerate(one.source_patterns)}
    # In the order of transformers: some renamings depend on those before.
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        converter, place = (None, 0) if pattern is None else sources[pattern]
        yield Loaded(key, name, converter, place)


def split_rows(loaded: Loaded, shapes: Shapes, checkpoint: Checkpoint) -> dict[str, tuple[str, int, int]]:
    """Return what loading splits a tensor into: name -> key, first row and number of rows (`Conversions.fused`).

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


def _only_stacks(converter: Any) -> bool:
    """Return whether a conversion only concatenates each expert's tensors, if several, and stacks the experts."""
    steps = [(type(one).__name__, one.dim) for one in converter.operations if hasattr(one, "dim")]
    stacks, puts_on_top = ("MergeModulelist", 0), ("Concatenate", 1)
    is_complete = len(steps) == len(converter.operations) and len(converter.target_patterns) == 1
    return is_complete and steps in ([stacks], [stacks, puts_on_top])


def _keeps_shape(loaded: Loaded, shapes: Shapes, checkpoint: Checkpoint) -> bool:
    """Return whether a transposition is left out, since the tensor has the shape of the model's already."""
    operation, *more = loaded.converter.operations
    if more or not getattr(operation, "check_dims", False):
        return False
    names = find_names([loaded.name], shapes)
    return loaded.name in names and shapes[names[loaded.name]] == checkpoint.tensors[loaded.key].shape
