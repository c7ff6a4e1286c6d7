"""Find the language model in a multimodal model.

In transformers, the part that reads and writes text has its own configuration, `text_config`, and the whole model's
`get_input_embeddings` returns the token embeddings of that part. Vision and audio towers and projectors lie outside it.
A few models (Phi-4 multimodal, GIT) have configurations only for their towers; the rest is the language model.
"""

from __future__ import annotations

import contextlib

from torch import nn

from smt_trainer.model.names import plain_name

TOWERS = ("vision_config", "audio_config")


def find_language_model(model: nn.Module) -> str:
    """Return the name of the language model in a larger model; "" if there is none, or the whole model is one."""
    text_config, embeddings = _configuration(model, "text_config"), _token_embeddings(model)
    if text_config is None or embeddings is None:
        return ""
    parts = {name: module for name, module in model.named_modules() if getattr(module, "config", None) is text_config}
    return next((name for name, part in parts.items() if any(module is embeddings for module in part.modules())), "")


def find_towers(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules that contain a tower but not the token embeddings. Empty unless the
    model has configurations for its towers and none for its text."""
    configs = [config for name in TOWERS if (config := _configuration(model, name)) is not None]
    embeddings = _token_embeddings(model)
    if not configs or embeddings is None or _configuration(model, "text_config") is not None:
        return []
    path = next(f"{name}." for name, module in model.named_modules() if module is embeddings)
    found = []
    for name, module in model.named_modules():
        if any(getattr(module, "config", None) is config for config in configs):
            parts = name.split(".")
            around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            found += [outer for outer in around if not path.startswith(f"{outer}.")][:1]
    return list(dict.fromkeys(found))


def _configuration(model: nn.Module, name: str) -> object | None:
    return getattr(getattr(model, "config", None), name, None)


def _token_embeddings(model: nn.Module) -> object | None:
    # A vision model may have none; transformers then raises.
    with contextlib.suppress(NotImplementedError, AttributeError):
        return model.get_input_embeddings()  # pyrefly: ignore[not-callable]


def vocabulary_weights(model: nn.Module) -> list[str]:
    """Return the full names of the weights of a model's token embeddings and output embeddings."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        # A vision model may have none; transformers then raises.
        with contextlib.suppress(NotImplementedError):
            found.append(getattr(model, get, lambda: None)())
    owned = {id(module) for module in found if isinstance(module, nn.Module)}
    return [
        plain_name(f"{path}.{name}")
        for path, module in model.named_modules()
        if id(module) in owned
        for name, _ in module.named_parameters(recurse=False)
    ]


def modules_beside(model: nn.Module, inner: str) -> list[str]:
    """Return the names of the outermost modules with parameters that are neither in nor around an inner module."""
    path, found = "", []
    for part in inner.split("."):
        around = f"{path}." if path else ""
        for name, child in model.get_submodule(path).named_children():
            if name != part and any(True for _ in child.parameters()):
                found.append(f"{around}{name}")
        path = f"{around}{part}"
    return found
