"""Find the language model in a model of images, sounds and text.

transformers gives the part that reads and writes text a configuration of its own, `text_config`, and the whole model
the token embeddings of that part. Towers that see or hear and projectors lie outside.
"""

from __future__ import annotations

import contextlib

from torch import nn


def find_language_model(model: nn.Module) -> str:
    """Return the name of the language model in a larger model; "" where there is none, or the whole model is one."""
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    embeddings = None
    # A model of images may have none, and transformers then raises.
    with contextlib.suppress(NotImplementedError, AttributeError):
        embeddings = model.get_input_embeddings()  # pyrefly: ignore[not-callable]
    if text_config is None or embeddings is None:
        return ""
    parts = {name: module for name, module in model.named_modules() if getattr(module, "config", None) is text_config}
    return next((name for name, part in parts.items() if any(module is embeddings for module in part.modules())), "")


def modules_beside(model: nn.Module, inner: str) -> list[str]:
    """Return the names of the modules that hold a weight and lie neither in nor around an inner module."""
    path, found = "", []
    for part in inner.split("."):
        around = f"{path}." if path else ""
        for name, child in model.get_submodule(path).named_children():
            if name != part and any(True for _ in child.parameters()):
                found.append(f"{around}{name}")
        path = f"{around}{part}"
    return found
