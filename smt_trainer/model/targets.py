"""Find the weights of a model that are targets (`kinds.py`), and say why the others are not (`untunable.py`).

Of the keywords, only 'all-conv' selects convolutions, and none selects embeddings; names and patterns can select both.

A weight with `requires_grad=False` was frozen on purpose and is not a target, even if `target_modules` names it. There
are two exceptions: if all parameters are frozen, as PEFT leaves a model after merging, the targets are tuned all the
same; and a weight that bitsandbytes has quantised cannot require a gradient anyway.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from smt_trainer.config import TARGET_KEYWORDS, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import (
    as_convolution,
    is_convolution,
    is_transposed_convolution,
)
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.grid import BlockGrid, make_grids
from smt_trainer.model.groups import LINEAR_KEYWORDS, is_meant, with_stack
from smt_trainer.model.heads import head_names
from smt_trainer.model.kinds import is_linear, named_targets, stores_transpose, weight_shape
from smt_trainer.model.language_model import find_language_model, find_towers, modules_beside
from smt_trainer.model.names import (
    by_projection,
    closest_ending,
    is_excluded,
    layer_index,
    lies_in,
    matches,
    plain_name,
)
from smt_trainer.model.quantised import is_quantised
from smt_trainer.model.sharded import full_shape
from smt_trainer.model.tensor_parallel import refuse_unfitting
from smt_trainer.model.untunable import HOW_TO_LOAD, shared_weights, why_not

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

logger = logging.getLogger(__name__)

ALL_CONVOLUTIONS = "all-conv"


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, Target]:
    """Find the weights to choose blocks from, by full name, in the model's order.

    Leave out, with a warning, matching weights that cannot be tuned: those that are frozen, shared (tied) or neither a
    plain matrix of floats nor quantised by bitsandbytes; those of modules whose `forward` is not the standard one, is
    replaced on the instance (offloading hooks) or is never called; and those of transposed convolutions. An embedding
    may share its weight with linears, and is then the target for both. Also warn about linears of other kinds.

    Raises:
        SMTError: the model holds PEFT adapters or compiled modules, nothing matches or a name in a list matches
            nothing (the message lists the model's linears), or no match can be tuned.
    """
    refuse_adapters(model)
    refuse_wrappers(model)
    everything = named_targets(model)
    _refuse_absent(model, everything, config)
    _warn_of_vain_exclusions(everything, config)
    apart = _heads(model)
    # A model without a head, like CLIP, compares text with images: none of its parts is the main one.
    if apart and config.target_modules in LINEAR_KEYWORDS:
        apart |= _beside_language_model(model, everything.keys() - apart, config)
    matching = _matching(model, everything, config, apart)
    shared = shared_weights(model)
    reasons = {name: why_not(model, target, shared) for name, target in matching.items()}
    targets = {name: target for name, target in matching.items() if reasons[name] is None}
    for reason, count in Counter(reason for reason in reasons.values() if reason is not None).items():
        first = next(name for name in reasons if reasons[name] == reason)
        many = "is" if count == 1 else f"and {count - 1} more are"
        logger.warning("`%s` %s not tuned: %s.", first, many, reason)
    packed = {name: module for name, module in _packed_linears(model).items() if _is_wanted([name], config, apart)}
    if packed:
        logger.warning("%s", _about_packed(packed))
    frozen = frozen_names(model, targets)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning("All parameters of the model are frozen (requires_grad=False). It is tuned as if none were.")
    if frozen:
        logger.warning("%s", _about_frozen(frozen, len(targets)))
        targets = {name: module for name, module in targets.items() if name not in frozen}
    if not targets:
        raise SMTError(_nothing_matches(config, everything, {**matching, **packed}))
    return targets


def target_grids(targets: Mapping[str, Target], config: SMTConfig) -> dict[str, BlockGrid]:
    """Make one grid per target from the config's `granularity` and `block_size`, in the layout of the stored weight.

    Raises:
        SMTError: as in `make_grids`; or tensor parallelism cuts a weight into slices that its blocks do not fit.
    """
    grids = make_grids({name: weight_shape(target) for name, target in targets.items()}, config)
    refuse_unfitting(targets, grids)
    return {name: _as_stored(grid, targets[name], config) for name, grid in grids.items()}


def _as_stored(grid: BlockGrid, target: Target, config: SMTConfig) -> BlockGrid:
    if is_convolution(target):
        return as_convolution(grid, target, config.granularity)
    return replace(grid, transposed=stores_transpose(target), embedding=is_embedding(target))


def refuse_adapters(model: nn.Module) -> None:
    """Raise `SMTError` if PEFT wraps a model or any of its modules."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise SMTError(
                f"{f'`{name}`' if name else 'the model'} is a PEFT {type(module).__name__}; blocks can be trained "
                "only in plain weights. Merge the adapter with model.merge_and_unload(), save that model with "
                "save_pretrained and load it again, since the delta needs it as its base; or drop the adapter with "
                "model.unload()."
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise `SMTError` if torch.compile or activation checkpointing wraps a model or any of its modules."""
    for name, _ in model.named_modules():
        if plain_name(f"{name}.") != f"{name}.":
            raise SMTError(
                f"`{name}` is inside a wrapper of torch.compile or activation checkpointing, whose name no checkpoint "
                "has. Pass the model as loaded, and let Trainer wrap it: TrainingArguments(torch_compile=True) or "
                "(gradient_checkpointing=True)."
            )


def frozen_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the targets whose weight is frozen; none if the whole model is frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    targets = named_targets(model)
    return [name for name in names if name in targets and _is_frozen(targets[name])]


def _is_frozen(target: Target) -> bool:
    if isinstance(target, ExpertMatrix):
        return not target.stack.requires_grad
    return not target.weight.requires_grad and not is_quantised(target)


def narrow(names: Iterable[str], config: SMTConfig) -> list[str]:
    """Keep the names of targets that this configuration selects, too."""
    return [name for name in names if _is_wanted(with_stack(name), config, apart=set())]


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied weights once: the denominator of the papers' `#Params%`."""
    return sum(math.prod(full_shape(parameter)) for parameter in model.parameters())


def _names_of(name: str, target: Target) -> list[str]:
    """Return the names by which a configuration may select a target."""
    return with_stack(name) if isinstance(target, ExpertMatrix) else [name]


def _heads(model: nn.Module) -> set[str]:
    """Return the names of the modules that no keyword selects: the output embeddings and the head of a task."""
    find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find_output()
    return {*head_names(model), *(name for name, module in model.named_modules() if module is output)}


def _beside_language_model(model: nn.Module, names: Iterable[str], config: SMTConfig) -> set[str]:
    """Return the modules outside the language model that hold some of these targets, such as a vision tower; warn."""
    inner = find_language_model(model)
    found = modules_beside(model, inner) if inner else find_towers(model)
    found = [module for module in found if any(lies_in(name, module) for name in names)]
    if found:
        logger.warning(
            "target_modules=%r means the language model%s; %s %s left alone. A list of names or a regular "
            "expression can select any module.",
            config.target_modules,
            f", `{inner}`" if inner else "",
            " and ".join(f"`{module}`" for module in found),
            "is" if len(found) == 1 else "are",
        )
    return set(found)


def _is_wanted(names: list[str], config: SMTConfig, apart: set[str]) -> bool:
    """Return whether the configuration selects a module with any of these names."""
    wanted = config.target_modules
    return (
        any(is_meant(name, wanted, apart) if wanted in LINEAR_KEYWORDS else matches(name, wanted) for name in names)
        and not any(is_excluded(name, config.exclude_modules) for name in names)
        and (config.lowest_layer == 0 or layer_index(names[0]) >= config.lowest_layer)
    )


def _matching(
    model: nn.Module, everything: Mapping[str, Target], config: SMTConfig, apart: set[str]
) -> dict[str, Target]:
    """Return the targets, and the transposed convolutions, that the configuration selects."""
    of_convolutions = of_embeddings = None if config.target_modules in TARGET_KEYWORDS else config
    if config.target_modules == ALL_CONVOLUTIONS:
        of_convolutions = replace(config, target_modules="all-linear")
    transposed, found = _transposed_convolutions(model), {}
    for name, target in (*everything.items(), *transposed.items()):
        asked = of_convolutions if name in transposed or is_convolution(target) else config
        asked = of_embeddings if is_embedding(target) else asked
        if asked is not None and _is_wanted(_names_of(name, target), asked, apart):
            found[name] = target
    return found


def _transposed_convolutions(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_transposed_convolution(module)}


def _refuse_absent(model: nn.Module, everything: Mapping[str, Target], config: SMTConfig) -> None:
    """Raise `SMTError` if a list names what no module of a kind with targets is called, whether it can be tuned or not.

    A name counts even if all that it matches are then left out: excluded, frozen, or in a layer that is too low.
    """
    wanted = config.target_modules
    if not isinstance(wanted, list):
        return
    names = {each for name, target in everything.items() for each in _names_of(name, target)}
    names |= _transposed_convolutions(model).keys() | _packed_linears(model).keys()
    absent = [pattern for pattern in wanted if not any(matches(name, [pattern]) for name in names)]
    if not absent:
        return
    keywords = [pattern for pattern in absent if pattern in TARGET_KEYWORDS]
    read = f" (in a list, {keywords[0]!r} means a module of this name; give a keyword alone)" if keywords else ""
    close = [closest_ending(pattern, names) for pattern in absent if pattern not in keywords]
    meant = " and ".join(repr(name) for name in close if name is not None)
    raise SMTError(
        f"target_modules={wanted!r}{read}: {' and '.join(map(repr, absent))} match{'es' * (len(absent) == 1)} no "
        f"linear of this model. {_listing(everything)} Name some of them in target_modules."
        f"{f' Did you mean {meant}?' if meant else ''}"
    )


def _warn_of_vain_exclusions(everything: Mapping[str, Target], config: SMTConfig) -> None:
    excluded = config.exclude_modules or []
    for patterns in [excluded] if isinstance(excluded, str) else [[name] for name in excluded]:
        if not any(is_excluded(name, patterns) for name in everything):
            logger.warning("exclude_modules=%r excludes nothing: this model has no such module.", patterns)


def _about_frozen(frozen: Collection[str], count: int) -> str:
    return (
        f"{len(frozen)} of {count} matching linears, such as `{next(iter(frozen))}`, are not tuned: their weights are "
        "frozen (requires_grad=False). To tune them too, call requires_grad_(True) on them first."
    )


def _packed_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Find modules that are no linears but have in and out features, such as linears of packed formats."""
    return {
        name: module
        for name, module in model.named_modules()
        if not is_linear(module)
        and all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
    }


def _about_packed(packed: dict[str, nn.Module]) -> str:
    name, first = next(iter(packed.items()))
    return (
        f"{len(packed)} linears, such as `{name}`, are not tuned: a {type(first).__name__} has no weight that is a "
        f"plain matrix of floats; {HOW_TO_LOAD}."
    )


def _listing(targets: Mapping[str, Target]) -> str:
    """Return a sentence that counts a model's linears, convolutions and embeddings by projection and shape."""
    shapes = Counter((*by_projection([name]), *weight_shape(target)) for name, target in targets.items())
    listing = ", ".join(f"{leaf} ({count} of {out}x{into})" for (leaf, out, into), count in shapes.items())
    none = "none (neither torch.nn.Linear nor Conv1D)"
    return f"Its linears, convolutions and embeddings are: {listing or none}."


def _nothing_matches(config: SMTConfig, targets: Mapping[str, Target], matching: Collection[str]) -> str:
    if matching:
        return (
            f"target_modules={config.target_modules!r} matches {len(matching)} linears, none of which can be tuned "
            "(see the warnings above). Choose other modules, unfreeze them, or load the model without a device map, "
            "and unquantised or quantised by bitsandbytes."
        )
    restrictions = "".join(
        f", {name}={value!r}"
        for name, value in (("exclude_modules", config.exclude_modules), ("lowest_layer", config.lowest_layer))
        if value
    )
    names, read = config.target_modules, ""
    if isinstance(names, str) and names not in TARGET_KEYWORDS:
        read = " (a regular expression for whole names; several names are a list)"
    return (
        f"target_modules={names!r}{read}{restrictions} matches no linear of this model. {_listing(targets)} Name some "
        f"of them in target_modules{', or lower lowest_layer' * bool(config.lowest_layer)}."
    )
