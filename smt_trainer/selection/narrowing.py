"""Decide whether scores that were computed under one configuration can serve another.

The other one may ask for fewer targets than were scored, never for more; the fields that decide the scores must be the
same. Module patterns that both share led to the scored modules and are not applied again, so no regular expression from
a file is ever run.
"""

from collections.abc import Iterable
from dataclasses import replace

from smt_trainer.config import TARGET_KEYWORDS, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.names import is_excluded, layer_index, matches
from smt_trainer.model.targets import narrow

# Keywords of `target_modules`, and the keywords that include them.
WIDER = {
    "qkv": ("attention", "all-linear"),
    "attention": ("all-linear",),
    "mlp": ("all-linear",),
    "experts": ("all-linear",),  # not 'mlp', which leaves out the experts of an attention
}


def narrowed(names: Iterable[str], scored: SMTConfig, asked: SMTConfig) -> list[str]:
    """Return the scored modules that a configuration keeps.

    Args:
        names: full names of the modules with scores.
        scored: the configuration of the scores.
        asked: the configuration that is to keep them.

    Raises:
        SMTError: `asked` needs other scores, or scores of more modules as far as names tell, or keeps no module.
    """
    names = list(names)
    _refuse_other(names, scored, asked)
    kept, excluded = names, newly_excluded(scored, asked)
    if asked.target_modules != scored.target_modules:
        kept = narrow(kept, replace(asked, exclude_modules=None))
    kept = [
        name
        for name in kept
        if not is_excluded(name, excluded) and (asked.lowest_layer == 0 or layer_index(name) >= asked.lowest_layer)
    ]
    if not kept:
        raise SMTError(
            f"{wanted_targets(asked)} leave none of the {len(names)} scored modules, such as `{names[0]}`. Narrow "
            "them less."
        )
    return kept


def newly_excluded(scored: SMTConfig, asked: SMTConfig) -> str | list[str] | None:
    """Return the `exclude_modules` of a configuration; None if they are those that the scores leave out already."""
    return None if asked.exclude_modules == scored.exclude_modules else asked.exclude_modules


def wanted_targets(config: SMTConfig) -> str:
    """Return the fields that decide the targets, for messages."""
    fields = ("target_modules", "exclude_modules", "lowest_layer")
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in fields)


def _refuse_other(names: list[str], scored: SMTConfig, asked: SMTConfig) -> None:
    def refuse(field: str, remedy: str) -> None:
        raise SMTError(
            f"the scores were computed with {field}={getattr(scored, field)!r}, which {field}="
            f"{getattr(asked, field)!r} does not fit; {remedy}."
        )

    for field in SMTConfig.deciding("scores"):
        if getattr(asked, field) != getattr(scored, field):
            refuse(field, "score the blocks again")
    if not _narrows(asked.target_modules, scored.target_modules, names):
        refuse("target_modules", "name fewer of the scored modules, or score the blocks again")
    if not _excludes_as_much(asked.exclude_modules, scored.exclude_modules):
        refuse("exclude_modules", "exclude these as well, or score the blocks again")
    if asked.lowest_layer < scored.lowest_layer:
        refuse("lowest_layer", "raise it, or score the blocks again")


def _narrows(ours: str | list[str], theirs: str | list[str], names: Iterable[str]) -> bool:
    """Return whether `target_modules` asks for no more than was scored; True for regular expressions, which only a
    model can tell."""
    if ours == theirs:
        return True
    if isinstance(ours, list):
        return all(any(matches(name, [pattern]) for name in names) for pattern in ours)
    return theirs in WIDER[ours] if ours in WIDER else ours not in TARGET_KEYWORDS


def _excludes_as_much(ours: str | list[str] | None, theirs: str | list[str] | None) -> bool:
    if theirs is None or ours == theirs:
        return True
    return isinstance(ours, list) and isinstance(theirs, list) and set(theirs) <= set(ours)
