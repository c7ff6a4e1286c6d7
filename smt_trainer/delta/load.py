"""Put a delta into a model, or load a delta's base and put the delta into that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smt_trainer.delta.checks import check_base, warn_of_rounding
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import GENERATION_CONFIG_FILE, load_config
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.onto import DEQUANTIZED, WAYS, check_onto, check_same_quantisation, quantised_names
from smt_trainer.errors import SMTError
from smt_trainer.manifest import refusing_damage
from smt_trainer.model.made_up import embeddings, made_up, new_rows
from smt_trainer.model.names import plain_name
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.sharded import assign, full_shape
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.block_selection import base_name
from smt_trainer.selection.tokens import lost_rows
from smt_trainer.sparse.convert import Model, merge_and_unload, rewrite_as
from smt_trainer.sparse.fit import base_dtype, find_linears
from smt_trainer.sparse.linear import smt_linears
from smt_trainer.sparse.state import SMTState, get_state, has_quantised_blocks, is_smt_model
from smt_trainer.sparse.write_back import write_back

# What of the arguments of from_pretrained says how the hub is read.
ACCESS = ("token", "cache_dir", "local_files_only")
# What of a configuration training decides.
LABELS = ("id2label", "label2id", "problem_type")
SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}


def load_delta(
    model: Model,
    delta: str | Path,
    *,
    revision: str | None = None,
    merge: bool = False,
    onto: str | None = None,
) -> Model:
    """Put a delta into a model, in place.

    Args:
        model: the plain base model, which is rewritten and can be trained further; or a model that already trains
            the same blocks.
        delta: a folder, also a checkpoint of SMTTrainer; or a name on the hub.
        revision: branch, tag or commit of a delta on the hub.
        merge: make the model plain again with the trained values in its weights.
        onto: for a delta of a quantised base, "original" to put it into plain weights, which that base was made of;
            "dequantized" with `merge` into quantised ones, which become dense (see `delta/onto.py`).

    Returns:
        The same model.

    Raises:
        SMTError: the delta is damaged, or belongs to another base or other blocks; or `onto` is left open. The model
            stays unchanged.
    """
    loaded = Delta.load(find_delta(delta, revision))
    if merge and onto is None and quantization_of(model) is not None and quantised_names(loaded):
        raise SMTError(f"the quantised weights of this model cannot hold the trained blocks. {WAYS}")
    put_delta(model, loaded, onto=onto)
    return merge_and_unload(model, onto=onto if onto == DEQUANTIZED else None) if merge else model


def put_delta(model: nn.Module, delta: Delta, *, has_weights: bool = True, onto: str | None = None) -> None:
    """Put a delta that is already in memory into a model, as `load_delta` without merging.

    Args:
        model: plain, or training the same blocks. A plain one gets the vocabulary of the delta.
        delta: what to put into it.
        has_weights: False on a rank that will get the base weights from another one; they are not checked then.
        onto: as in `load_delta`.
    """
    if is_smt_model(model):
        check_same_blocks(model, delta)
        destinations = whole_destinations(model, delta)
    else:
        quantization = quantization_of(model)
        check_onto(delta, onto, is_quantised=quantization is not None)
        if quantization is not None:
            check_same_quantisation(delta, quantization)
        with _vocabulary_of(delta, model):
            linears = find_linears(model, delta.selection)
            if has_weights:
                check_base(delta, base_name(model), differences(model, delta))
            _refuse_lost(model, delta)
            destinations = whole_destinations(model, delta)
            whole = find_whole(model, delta.selection.config, linears, stored=delta.whole)
            _check_complete(model, delta, whole)
        dtype = base_dtype(model, linears)
        # What the configuration names, and what only the first loading knew.
        named = tuple(f"{name}." for name in whole)
        whole = (*whole, *(name for name in delta.whole if not f"{name}.".startswith(named)))
        state = SMTState(delta.selection, whole, delta.base, dtype, frozenset(delta.unnamed))
        rewrite_as(model, replace(state, quantization=quantization))
    dtypes = {name: linear.weight_dtype for name, linear in smt_linears(model)}
    dtypes |= {name: destinations[name].dtype for name in delta.whole}
    warn_of_rounding(delta, {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()})
    put_blocks(model, delta.blocks)
    for name, tensor in delta.whole.items():
        assign(destinations[name], tensor)


def put_blocks(model: nn.Module, blocks: Mapping[str, Tensor]) -> None:
    """Set the blocks of a rewritten model, in the order of selections, and write them into its weights."""
    for name, linear in smt_linears(model):
        assign(linear.blocks, blocks[name][linear.row_major_order().argsort()])
    write_back(linear for _, linear in smt_linears(model))


def from_delta(
    delta: str | Path,
    auto_class: Any = None,
    *,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    merge: bool = True,
    onto: str | None = None,
    **kwargs,
):
    """Load a delta's base model and put the delta into it: weights, labels, special tokens and generation config.

    Args:
        delta: folder or hub name of the delta.
        auto_class: the class to load the base with; by default the class that was trained.
        revision: branch, tag or commit of a delta on the hub.
        base: hub name or path of the base; by default the name that the delta records.
        base_revision: revision of a base on the hub; without `base`, by default the commit that the delta records.
        merge: return a plain model. Blocks in quantised weights stay beside them, unless `onto` says otherwise.
        onto: for a delta of a quantised base that is loaded without `quantization_config`: "dequantized" or "original"
            (see `delta/onto.py`).
        kwargs: passed to `auto_class.from_pretrained`; `token`, `cache_dir` and `local_files_only` count for the delta
            as well. `dtype` defaults to that of training. With the `quantization_config` of training, the model is
            exactly the trained one.

    Raises:
        SMTError: as in `load_delta`; or `base` is not given, and the delta records none or `trust_remote_code` would
            run the code of the one that it names.
    """
    folder = find_delta(delta, revision, **{key: kwargs[key] for key in ACCESS if key in kwargs})
    loaded = Delta.load(folder)
    if base is None:
        base, _, commit = (loaded.selection.base_model or "").partition("@")
        base_revision = base_revision or commit or None
        if base and kwargs.get("trust_remote_code"):
            raise SMTError(
                f"trust_remote_code=True runs code of the base, and the delta in {delta} names {base!r} as its base: "
                "its author would decide whose code runs. Say base= yourself."
            )
    if not base:
        raise SMTError(f"the delta in {delta} records no base model; pass base=<hub name or path>.")
    if base_revision is not None:
        kwargs["revision"] = base_revision
    trained = load_config(folder)
    # With a configuration, from_pretrained takes no field of it.
    labels = {key: trained[key] for key in LABELS if key in trained and "config" not in kwargs}
    with refusing_damage(f"configuration beside the delta in {delta}"):
        if "id2label" in labels:
            labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
    if loaded.quantization is not None and "quantization_config" not in kwargs:
        stored = _is_quantised(base, kwargs)
        check_onto(loaded, onto, is_quantised=stored)
        if onto == DEQUANTIZED and not stored:
            kwargs["quantization_config"] = as_config(loaded.quantization)
    dtype = loaded.weight_dtype if loaded.quantization is None else loaded.base.dtype
    # transformers still takes the older name, after the newer one.
    given = {"dtype": kwargs.pop("torch_dtype")} if "torch_dtype" in kwargs else {}
    model = (auto_class or trained_class(loaded)).from_pretrained(
        base, **{"dtype": getattr(torch, dtype)} | given | labels | kwargs
    )
    put_delta(model, loaded, onto=onto)
    for key in SPECIAL_TOKENS & trained.keys():
        setattr(model.config, key, trained[key])
    if Path(folder, GENERATION_CONFIG_FILE).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    if has_quantised_blocks(model) and onto is None:
        return model
    return merge_and_unload(model, onto=onto if has_quantised_blocks(model) else None) if merge else model


def _is_quantised(base: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a checkpoint is stored quantised, by its configuration."""
    from transformers import PretrainedConfig

    where = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if key in kwargs}
    return "quantization_config" in PretrainedConfig.get_config_dict(base, **where)[0]


def as_config(quantization: Any) -> Any:
    """Return the configuration of transformers that a delta records."""
    from transformers.quantizers import AutoQuantizationConfig

    with refusing_damage("record of how the delta's base was quantised"):
        return AutoQuantizationConfig.from_dict(quantization)


def trained_class(delta: Delta) -> Any:
    """Return the class of transformers that was trained, as the delta names it; a causal LM if it names none."""
    import transformers

    # The name comes from a file; only a model's class is meant.
    found = getattr(transformers, delta.architecture, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModelForCausalLM


def differences(model: nn.Module, delta: Delta) -> list[str]:
    """Return the names of the base's tensors that a plain model has with other values."""
    return delta.base.differences_in(model, quantised=quantization_of(model) is not None)


@contextlib.contextmanager
def _vocabulary_of(delta: Delta, model: nn.Module) -> Iterator[None]:
    """Give a model as many token embeddings as the delta has, if the delta stores them, or those that the model lacks;
    take this back if the context ends in an exception."""
    before = {name: model.get_parameter(name).detach() for name in embeddings(model)}
    rows = {len(delta.whole[name]): len(values) for name, values in before.items() if name in delta.whole}
    for name, values in before.items():
        new = delta.selection.new_rows(name.removesuffix(".weight"), len(values))
        rows |= {new.stop: new.start} if new else {}
    resize: Any = getattr(model, "resize_token_embeddings", None)
    changes = [(new, old) for new, old in rows.items() if new != old and callable(resize)]
    for new, _ in changes:
        resize(new, mean_resizing=False)
    try:
        yield
    except BaseException:
        for _, old in changes:
            resize(old, mean_resizing=False)
            for name, values in before.items():
                assign(model.get_parameter(name), values)
        raise


def _refuse_lost(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` if loading made up parameters of a model that the delta does not hold."""
    rows = new_rows(model).keys() - lost_rows(model, delta.selection)
    lost = [name for name in made_up(model) if name not in delta.whole and name not in rows]
    if lost:
        raise SMTError(
            f"loading made up `{lost[0]}` of the {type(model).__name__}, and the delta does not hold it. Load the base "
            f"as {delta.architecture or 'the class of training'}."
        )


def check_same_blocks(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` unless a delta is of the blocks that a rewritten model trains, and of its base."""
    state = get_state(model)
    ours, theirs = state.selection.block_indices, delta.selection.block_indices
    same = ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    if not same or state.base != delta.base:
        raise SMTError(
            "the delta holds other blocks than this model trains, or blocks of another base. Load it into the plain "
            "base model instead."
        )


def whole_destinations(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Return a model's tensors by name; raise `SMTError` unless what the delta trains whole fits them."""
    destinations = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in delta.whole.items():
        if name not in destinations or full_shape(destinations[name]) != tuple(tensor.shape):
            found = list(full_shape(destinations[name])) if name in destinations else "none"
            raise SMTError(
                f"the delta holds `{name}` of shape {list(tensor.shape)}; this model has {found}. Load the base with "
                "the same head (number of labels) as in training."
            )
    return destinations


def _check_complete(model: nn.Module, delta: Delta, names: Iterable[str]) -> None:
    """Raise `SMTError` unless a delta holds whole the modules and biases of these names, and no other parameter."""
    prefixes = tuple(f"{name}." for name in names)
    tensors = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    wanted = {id(tensor): name for name, tensor in tensors.items() if f"{name}.".startswith(prefixes)}
    found = {id(tensors[name]): name for name in delta.whole if name in tensors}
    missing = [name for key, name in wanted.items() if key not in found]
    strange = [name for key, name in found.items() if key not in wanted and isinstance(tensors[name], nn.Parameter)]
    strange = [name for name in strange if name not in delta.unnamed]
    if missing or strange:
        raise SMTError(
            f"the delta {'lacks' if missing else 'holds'} `{(missing or strange)[0]}`, which this model "
            f"{'trains' if missing else 'does not train'} whole under the delta's configuration. It is damaged, or the "
            "model is of another class than in training."
        )
