"""A rewritten model as others should see it: the state dict and the saved files of a plain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smt_trainer.errors import SMTError
from smt_trainer.model.names import plain_name, unwrapped
from smt_trainer.model.sharded import full_tensor, is_sharded
from smt_trainer.sparse.linear import BlockLinear
from smt_trainer.sparse.state import has_quantised_blocks

CANNOT_HOLD = (
    "the quantised weights of this model cannot hold the trained blocks. Save the delta (save_delta, "
    "trainer.save_model), or say that they are put into the weights made dense: "
    "merge_and_unload(model, onto='dequantized'), trainer.merge_and_save(folder, onto='dequantized')."
)


def plain_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict that the model would have after `merge_and_unload`; leave the model as it is.

    A collective when the model is sharded over ranks. Tied weights stay tied. With `keep=False`, this rank only takes
    part and gets an empty dictionary.
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
    """Let `save_pretrained` and `push_to_hub` write a plain model: leave out what only a rewritten one has.

    Over quantised blocks they are refused: they would write the weights as bitsandbytes holds them, without blocks.
    """
    if has_quantised_blocks(model):
        vars(model)["save_pretrained"] = _refuse_to_save
    for module, ignored, own in list(_saving_modules(model)):
        _ignore_on_save(module, ignored | own)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_as_plain`, while the model is still a rewritten one."""
    if has_quantised_blocks(model):
        vars(model).pop("save_pretrained", None)
    for module, ignored, own in list(_saving_modules(model)):
        _ignore_on_save(module, ignored - own)


def _refuse_to_save(*args, **kwargs) -> None:
    """Stands for the `save_pretrained` of a model whose quantised weights cannot hold the blocks."""
    raise SMTError(CANNOT_HOLD)


def _saving_modules(model: nn.Module) -> Iterator[tuple[nn.Module, set[str], set[str]]]:
    """Yield the modules of a model that have a `save_pretrained` of transformers, itself or parts of it; the keys that
    each leaves out; and the keys in it that only a rewritten model has."""
    for path, module in model.named_modules():
        ignored: Any = getattr(module, "_keys_to_ignore_on_save", ...)
        if ignored is not ...:
            prefix = f"{unwrapped(path)}." if path else ""
            own = {key.removeprefix(prefix) for key in _own_keys(model) if key.startswith(prefix)}
            yield module, set(ignored or ()), own


def _ignore_on_save(model: nn.Module, keys: set[str]) -> None:
    model._keys_to_ignore_on_save = keys  # pyrefly: ignore[bad-argument-type]  # as in `set_state`


def _own_keys(model: nn.Module) -> set[str]:
    """Return the keys that the state dict of a rewritten model has and that of a plain one has not."""
    names = [unwrapped(name) for name, module in model.named_modules() if isinstance(module, BlockLinear)]
    return {f"{name}.{part}" for name in names for part in ("blocks", "block_indices")}
