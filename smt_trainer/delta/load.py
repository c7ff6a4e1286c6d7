"""Load a delta into a model, or together with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import GENERATION_CONFIG_FILE, load_config
from smt_trainer.delta.hub import find_delta
from smt_trainer.delta.onto import DEQUANTIZED, WAYS, check_onto, quantised_names
from smt_trainer.delta.put import put_delta
from smt_trainer.delta.training_settings import SPECIAL_TOKENS, training_settings
from smt_trainer.errors import SMTError, first_line
from smt_trainer.manifest import refusing_damage
from smt_trainer.model.hub import split_commit
from smt_trainer.model.quantised import quantization_of
from smt_trainer.model.skeleton import model_class
from smt_trainer.sparse.convert import Model, merge_and_unload
from smt_trainer.sparse.state import has_quantised_blocks

# Arguments of from_pretrained that say how to access the hub.
ACCESS = ("token", "cache_dir", "local_files_only")


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
        onto: for a delta of a quantised base: "original" puts it into the plain weights that were quantised;
            "dequantized", with `merge`, into the quantised weights, which become dense (see `delta/onto.py`).

    Returns:
        The same model.

    Raises:
        SMTError: the delta is damaged, or belongs to another base or other blocks; or `onto` is missing or does not
            apply. The model stays unchanged.
    """
    loaded = Delta.load(find_delta(delta, revision))
    if merge and onto is None and quantization_of(model) is not None and quantised_names(loaded):
        raise SMTError(f"the quantised weights of this model cannot hold the trained blocks. {WAYS}")
    put_delta(model, loaded, onto=onto)
    return merge_and_unload(model, onto=onto if onto == DEQUANTIZED else None) if merge else model


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
        merge: return a plain model. Blocks in quantised weights stay separate from them unless `onto` is given.
        onto: for a delta of a quantised base that is loaded without `quantization_config`: "dequantized" or "original"
            (see `delta/onto.py`).
        kwargs: passed to `auto_class.from_pretrained`; `token`, `cache_dir` and `local_files_only` also apply to the
            delta. `dtype` defaults to that of training. With the `quantization_config` of training, the model is
            exactly the trained one.

    Raises:
        SMTError: as in `load_delta`; `auto_class` is no class; there is no such base; or `base` is missing, and the
            delta records none or `trust_remote_code` would run code of the base that it names.
    """
    if auto_class is not None and not hasattr(auto_class, "from_pretrained"):
        raise SMTError(f"auto_class must be a class with from_pretrained, got {auto_class!r}. Pass a base as base=.")
    folder = find_delta(delta, revision, **{key: kwargs[key] for key in ACCESS if key in kwargs})
    loaded = Delta.load(folder)
    by_user = base is not None
    if base is None:
        base, commit = split_commit(loaded.selection.base_model)
        base_revision = base_revision or commit
        if base and kwargs.get("trust_remote_code"):
            raise SMTError(
                f"trust_remote_code=True runs code of the base, and the delta in {delta} names {base!r} as its base: "
                "the delta's author would decide whose code runs. Pass base= yourself."
            )
    if not base:
        raise SMTError(f"the delta in {delta} records no base model; pass base=<hub name or path>.")
    whose = "you gave" if by_user else f"the delta in {delta} names"
    if not (Path(base).exists() or _may_be_on_hub(str(base))):
        raise SMTError(
            f"there is no folder at {base}, the base that {whose}. {'Check' if by_user else 'Pass'} base=<hub name or "
            "path>."
        )
    if base_revision is not None:
        kwargs["revision"] = base_revision
    trained = load_config(folder)
    # With `config=`, from_pretrained takes no separate fields of it.
    settings: dict[str, Any] = {}
    if "config" not in kwargs:
        with refusing_damage(f"configuration beside the delta in {delta}"):
            settings = training_settings(folder, base, kwargs)
    if loaded.quantization is not None and "quantization_config" not in kwargs:
        stored = _is_quantised(base, kwargs)
        check_onto(loaded, onto, is_quantised=stored)
        if onto == DEQUANTIZED and not stored:
            kwargs["quantization_config"] = as_config(loaded.quantization)
    dtype = loaded.weight_dtype if loaded.quantization is None else loaded.fingerprint.dtype
    # transformers still accepts the older name; the newer one takes precedence.
    given = {"dtype": kwargs.pop("torch_dtype")} if "torch_dtype" in kwargs else {}
    try:
        model = (auto_class or trained_class(loaded)).from_pretrained(
            base, **{"dtype": getattr(torch, dtype)} | given | settings | kwargs
        )
    except OSError as error:
        raise SMTError(
            f"the base {base!r}, which {whose}, could not be loaded: {first_line(error)} If it lies elsewhere, pass "
            "base=<hub name or path>."
        ) from error
    put_delta(model, loaded, onto=onto)
    for key in SPECIAL_TOKENS & trained.keys():
        setattr(model.config, key, trained[key])
    if Path(folder, GENERATION_CONFIG_FILE).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    is_apart = has_quantised_blocks(model) and onto is None
    return model if is_apart or not merge else merge_and_unload(model, onto=onto if onto == DEQUANTIZED else None)


def _may_be_on_hub(base: str) -> bool:
    """Return whether the name of a base could be one on the hub, and not only a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def _is_quantised(base: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a checkpoint is stored quantised, by its configuration."""
    from transformers import PretrainedConfig

    where = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if key in kwargs}
    return PretrainedConfig.get_config_dict(base, **where)[0].get("quantization_config") is not None


def as_config(quantization: Any) -> Any:
    """Return the quantisation config of transformers that a delta records."""
    from transformers.quantizers import AutoQuantizationConfig

    with refusing_damage("record of how the delta's base was quantised"):
        return AutoQuantizationConfig.from_dict(quantization)


def trained_class(delta: Delta) -> Any:
    """Return the class of transformers that was trained, as the delta names it; a causal LM if it names none."""
    from transformers import AutoModelForCausalLM

    return model_class(delta.architecture) or AutoModelForCausalLM
