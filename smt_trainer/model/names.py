"""Read the full name of a module: its layer, its projection, and whether a pattern matches it.

`model.layers.7.self_attn.v_proj` lies in layer 7, whose path is `model.layers.7`. A *projection* is the modules in the
same place of every layer, here `v_proj`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from smt_trainer.errors import SMTError

# Wrappers of torch.compile and activation checkpointing; the names in checkpoints do not have these parts.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")

# Name of the module that holds the trained blocks of experts (`sparse/experts.py`); plain models do not have it.
EXPERT_BLOCKS = "smt_experts"
# Buffer of a rewritten module (`sparse/block_module.py`); plain models do not have it.
BLOCK_INDICES = "block_indices"

# How many leading parts, such as `model.`, a name may have in one place and lack in another.
MOST_PREFIXES = 2


def unwrapped(name: str) -> str:
    """Return the name of a module or parameter without the names of wrappers on its path."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain_name(name: str) -> str:
    """Return the name in the plain model that corresponds to a name in a wrapped or rewritten one."""
    return unwrapped(name).replace(f"{EXPERT_BLOCKS}.", "")


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Match as PEFT does: a string is a regular expression for the whole name, a list holds names or their endings."""
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise SMTError(f"{patterns!r} is not a regular expression ({error}). Write one, or list names.") from error
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def closest_ending(pattern: str, names: Iterable[str]) -> str | None:
    """Return the ending of a name, of as many parts as the pattern, that is most like it; None if none is alike."""
    length = pattern.count(".") + 1
    endings = {".".join(name.split(".")[-length:]) for name in names}
    return next(iter(difflib.get_close_matches(pattern, endings, 1)), None)


def is_excluded(name: str, patterns: str | Iterable[str] | None) -> bool:
    """Return whether a list names a module or one around it, or a regular expression matches its whole name."""
    if patterns is None or isinstance(patterns, str):
        return bool(patterns) and matches(name, patterns)
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), patterns) for end in range(1, len(parts) + 1))


def lies_in(name: str, module: str) -> bool:
    """Return whether a full name belongs to a module or to something in it."""
    return f"{name}.".startswith(f"{module}.")


def layer_path(name: str) -> str:
    """Return a module's path up to the number of its layer: `encoder.layers.7.fc1` -> `encoder.layers.7`.

    The number of a layer follows the name of a list. A number at the beginning is instead the place in a pipeline, as
    in `0.auto_model.encoder.layer.3.output`, unless it is the whole name. Outside the layers the path is "".
    """
    path = name.split(".")
    place = next((place for place, part in enumerate(path) if _is_number(part) and (place or len(path) == 1)), None)
    return "" if place is None else ".".join(path[: place + 1])


def layer_index(name: str) -> int:
    """Return the number of a module's layer (`model.layers.7.self_attn.q_proj` -> 7); -1 outside the layers."""
    return int(layer_path(name).rpartition(".")[2] or -1)


def expert_index(name: str) -> int:
    """Return the number of an expert (`mlp.experts.gate_up_proj.7`, `mlp.experts.7.w1` -> 7); -1 for other modules."""
    path = name.split(".")
    place = next((place for place, part in enumerate(path) if "experts" in part.lower()), len(path))
    return next((int(part) for part in path[place:] if _is_number(part)), -1)


def by_projection(names: Iterable[str]) -> dict[str, list[str]]:
    """Return projection -> its modules, in order.

    A projection is labelled with the last part of its modules' names. If several share it (T5's `q`), the parts in
    which they differ are put before it: `decoder.EncDecAttention.q`.
    """
    paths: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        paths.setdefault(tuple(part for part in name.split(".") if not _is_number(part)), []).append(name)
    shared: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        shared[path[-1:]] = shared.get(path[-1:], set(path)) & set(path)
    labelled: dict[str, list[str]] = {}
    for path, modules in paths.items():
        label = ".".join([*(part for part in path[:-1] if part not in shared[path[-1:]]), *path[-1:]])
        labelled.setdefault(label, []).extend(modules)
    return labelled


def list_projections(names: Iterable[str]) -> str:
    """Count modules by projection, for a message: `q_proj (2), v_proj (2)`."""
    return ", ".join(f"{label} ({len(modules)})" for label, modules in by_projection(names).items())


def _is_number(part: str) -> bool:
    """Return whether a part of a name is a number that `int` reads: fewer than 10 ASCII digits."""
    return part.isascii() and part.isdigit() and len(part) < 10


def find_names(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Map each wanted name to the one of `names` that equals it up to a prefix on either side, if just one does."""
    names = set(names)
    longer: dict[str, list[str]] = {}
    for name in names:
        for ending in _endings(name):
            longer.setdefault(ending, []).append(name)
    found = {}
    for name in wanted:
        candidates = [name] if name in names else longer.get(name, [])
        candidates = candidates or [ending for ending in _endings(name) if ending in names][:1]
        if len(candidates) == 1:
            found[name] = candidates[0]
    return found


def _endings(name: str) -> list[str]:
    """Return a name without its first part, such as `model.`, and so on up to `MOST_PREFIXES`; keep two parts."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(1, min(len(parts) - 1, MOST_PREFIXES + 1))]
