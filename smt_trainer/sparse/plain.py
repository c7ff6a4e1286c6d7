"""Make a rewritten model look plain from outside: in its state dict and in the files that it saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.names import plain_name, unwrapped
from smt_trainer.model.sharded import full_tensor, is_sharded
from smt_trainer.sparse.block_module import BlockModule
from smt_trainer.sparse.state import has_quantised_blocks

CANNOT_HOLD = (
    "the quantised weights of this model cannot hold the trained blocks. Save the delta (save_delta, "
    "trainer.save_model), or merge the blocks into dequantised weights: "
    "merge_and_unload(model, onto='dequantized'), trainer.merge_and_save(folder, onto='dequantized')."
)


def plain_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict that the model would have after `merge_and_unload`; leave the model as it is.

    A collective when the model is sharded over ranks. Tied weights stay tied. With `keep=False`, this rank only takes
    part in the collective and gets an empty dictionary.
    """
    own = _own_keys(model)
    gathered, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if unwrapped(name) in own:
            continue
        if id(tensor) not in gathered:
            whole = full_tensor(tensor)
            gathered[id(tensor)] = whole.cpu() if is_sharded(tensor) and keep else whole
        if keep:
            state[plain_name(name)] = gathered[id(tensor)]
        else:
            gathered[id(tensor)] = None
    return state


def save_as_plain(model: nn.Module) -> None:
    """Make `save_pretrained` and `push_to_hub` write a plain model, without the keys that only a rewritten one has.

    With blocks in quantised weights, both raise `SMTError`: they would write the quantised weights without the blocks.
    """
    if has_quantised_blocks(model):
        vars(model)["save_pretrained"] = _refuse_to_save
    for module, ignored, own in list(_saving_modules(model)):
        _ignore_on_save(module, ignored | own)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_as_plain`; to be called before the model is made plain."""
    if has_quantised_blocks(model):
        vars(model).pop("save_pretrained", None)
    for module, ignored, own in list(_saving_modules(model)):
        _ignore_on_save(module, ignored - own)


def _refuse_to_save(*args, **kwargs) -> None:
    """Raise `SMTError` in place of `save_pretrained`, for a model whose quantised weights cannot hold the blocks."""
    raise SMTError(CANNOT_HOLD)


def _saving_modules(model: nn.Module) -> Iterator[tuple[nn.Module, set[str], set[str]]]:
    """Yield, for the model and each part of it with the `save_pretrained` of transformers: the module, the keys that it
    leaves out on saving, and its keys that only a rewritten model has."""
    for path, module in model.named_modules():
        ignored: Any = getattr(module, "_keys_to_ignore_on_save", ...)
        if ignored is not ...:
            prefix = f"{unwrapped(path)}." if path else ""
            own = {key.removeprefix(prefix) for key in _own_keys(model) if key.startswith(prefix)}
            yield module, set(ignored or ()), own


def _ignore_on_save(model: nn.Module, keys: set[str]) -> None:
    model._keys_to_ignore_on_save = keys  # pyrefly: ignore[bad-argument-type]  # as in `set_state`


def _own_keys(model: nn.Module) -> set[str]:
    """Return the keys of a rewritten model's state dict that a plain model does not have."""
    names = [unwrapped(name) for name, module in model.named_modules() if isinstance(module, BlockModule)]
    return {f"{name}.{part}" for name in names for part in ("blocks", "block_indices")}
