"""Find what is trained whole, besides the blocks, and stored in the delta: the modules named in `modules_to_save`, or
by default the new head (`heads.py`) and every other newly initialised parameter; normalisation layers (`train_norm`);
and biases of the linears with blocks (`train_bias`). Modules named in `modules_to_save` are trained even if they are
frozen (`requires_grad=False`). From the new head, norms and biases, frozen parameters are left out, unless the whole
model is frozen.

Whole parameters have no master copy: they are trained in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.heads import head_names
from smt_trainer.model.language_model import vocabulary_weights
from smt_trainer.model.names import layer_index, lies_in, matches, plain_name
from smt_trainer.model.newly_initialised import new_rows, newly_initialised
from smt_trainer.model.quantised import is_quantised
from smt_trainer.model.sharded import is_dtensor


def find_whole(
    model: nn.Module, config: SMTConfig, linears: Iterable[str], stored: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Find the full names of the modules and parameters to train whole.

    Args:
        model: a plain model.
        config: its `modules_to_save`, `train_norm` and `train_bias`.
        linears: names of the linears that have blocks, or may get them.
        stored: names of the whole tensors in a delta. They tell what was trained, whatever is frozen in this model.

    Raises:
        SMTError: a name matches no module, a linear lies in a module to train whole, norms or biases are missing, or
            a newly initialised parameter would be left out of the delta.
    """
    linears, trained = list(linears), _with_parents(_trainable(model) if stored is None else stored)
    if config.modules_to_save is None:
        found = [name for name in head_names(model) if name in trained]
    else:
        found = _find_named(model, config.modules_to_save)
    found += _left_newly_initialised(model, config, found)
    _refuse_quantised(model, found)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained_whole = {id(parameters[name]): whole for name in parameters for whole in found if lies_in(name, whole)}
    for linear in linears:
        whole = next((name for name in found if lies_in(linear, name)), None)
        if whole is None:
            # Its weight may be tied to a head's.
            whole = trained_whole.get(id(parameters.get(f"{linear}.weight")))
        if whole is not None:
            raise SMTError(
                f"`{linear}` is a target but lies in `{whole}`, or shares its weight, which modules_to_save trains "
                "whole. Add the target to exclude_modules, or remove the module from modules_to_save."
            )
    if config.train_norm:
        norms = [name for name in _norms(model, config.lowest_layer) if name in trained]
        found += _expect(norms, "train_norm=True, but this model has no norm layer, or all are frozen")
    if config.train_bias:
        # The matrix of an expert is no module and has no bias of its own.
        biases = [name for name in (f"{linear}.bias" for linear in linears) if name in parameters and name in trained]
        found += _expect(biases, "train_bias=True, but none of the linears with blocks has a bias, or all are frozen")
    _refuse_sharded(parameters, found)
    return tuple(dict.fromkeys(found))


def _left_newly_initialised(model: nn.Module, config: SMTConfig, found: list[str]) -> list[str]:
    """Return the newly initialised parameters that `found` does not cover, except new rows of the vocabulary; refuse
    those that must be named."""
    left = [name for name in newly_initialised(model) if not any(name.startswith(f"{module}.") for module in found)]
    if left:
        # New rows are trained as blocks (`selection/tokens.py`).
        held = new_rows(model)
        left = [name for name in left if name not in held]
    resized = [name for name in vocabulary_weights(model) if name in left]
    if resized:
        raise SMTError(
            f"`{resized[0]}` has other rows than the model's checkpoint, so the base cannot restore them. Train it "
            f"whole with modules_to_save={[resized[0].split('.')[-2]]!r}, or do not resize the vocabulary."
        )
    if left and config.modules_to_save is not None:
        raise SMTError(
            f"loading newly initialised `{left[0]}`, which the checkpoint does not have, and modules_to_save="
            f"{config.modules_to_save!r} leaves it out, so neither the base nor the delta could restore it. Add it to "
            "modules_to_save, or leave modules_to_save at None."
        )
    return left


def _refuse_quantised(model: nn.Module, found: list[str]) -> None:
    """Raise `SMTError` if a module to train whole holds a quantised weight, which no gradient can change."""
    for name, module in model.named_modules():
        whole = next((one for one in found if lies_in(name, one)), None)
        if whole is not None and is_quantised(module):
            raise SMTError(
                f"modules_to_save trains `{whole}` whole, but the weight of `{name}` is quantised. Leave it out, or "
                "load the model with that module in llm_int8_skip_modules."
            )


def _refuse_sharded(parameters: Mapping[str, Tensor], found: list[str]) -> None:
    """Raise `SMTError` if tensor parallelism has cut a parameter to train whole. FSDP2 shards it only later."""
    for name, parameter in parameters.items():
        whole = next((one for one in found if lies_in(name, one)), None)
        if whole is not None and is_dtensor(parameter):
            raise SMTError(
                f"`{name}` is to be trained whole, but tensor parallelism cuts it over ranks. Leave `{whole}` out of "
                "what is trained whole (modules_to_save, train_norm, train_bias), or load the model without a "
                "distributed_config."
            )


def get_whole(model: nn.Module, name: str) -> nn.Module | Tensor:
    """Return the module, parameter or buffer with a name that `find_whole` returned."""
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def stored_whole(state: Mapping[str, Tensor], whole: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a state dict (`keep_vars=True`) with, or under, one of the names; tied ones once."""
    names = set(whole)
    prefixes, seen, found = tuple(f"{name}." for name in names), set(), {}
    for key, tensor in state.items():
        name = plain_name(key)
        if (name in names or name.startswith(prefixes)) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _trainable(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not frozen; of all if the whole model is frozen."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, parameter in parameters.items() if parameter.requires_grad] or list(parameters)


def _with_parents(names: Iterable[str]) -> set[str]:
    """Return the names of tensors, and of all modules around them."""
    parts = [name.split(".") for name in names]
    return {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}


def _find_named(model: nn.Module, names: list[str]) -> list[str]:
    found = []
    for wanted in names:
        matching = [name for name, _ in model.named_modules() if matches(name, [wanted])]
        if not matching:
            raise SMTError(
                f"modules_to_save names {wanted!r}, which this model does not have. Its top-level modules are: "
                f"{', '.join(name for name, _ in model.named_children())}."
            )
        if not any(model.get_submodule(name).state_dict() for name in matching):
            raise SMTError(
                f"modules_to_save names {wanted!r}, which has no parameters or buffers to train. Leave it out."
            )
        found += matching
    return list(dict.fromkeys(found))


def _norms(model: nn.Module, lowest_layer: int) -> list[str]:
    """Find normalisation modules with parameters, by class name, outside the layers and from the lowest layer on."""
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and any(True for _ in module.parameters(recurse=False))
        and (layer_index(name) == -1 or layer_index(name) >= lowest_layer)
    ]


def _expect(names: list[str], complaint: str) -> list[str]:
    if not names:
        raise SMTError(f"{complaint}. Leave it at False.")
    return names
