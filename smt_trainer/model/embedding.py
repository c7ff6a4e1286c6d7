"""Treat embeddings as targets: what their rows are, and which heads share their weight.

An embedding has a weight W [V, H] and looks up y[t] = W[ids[t]], so a row of its grid is a token, and

    dW[v] = sum of dy[t] over all t with ids[t] = v; 0 for the padding token (`padding_idx`)

The output embeddings of many models are tied: a linear with the same parameter computes logits = x W^T. Its gradient
dlogits^T x is added to dW, the padding token's row included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_embedding(module: object) -> TypeIs[nn.Embedding]:
    """Return whether a module is an embedding."""
    return isinstance(module, nn.Embedding)


def has_lookup_forward(embedding: nn.Embedding) -> bool:
    """Return whether an embedding's class only looks rows up, or also scales them, as Gemma's does."""
    return type(embedding).forward is nn.Embedding.forward or is_scaled(type(embedding))


def is_scaled(kind: type[nn.Embedding]) -> bool:
    """Return whether a class is one of transformers' embeddings that scale the looked-up rows."""
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")


def unusual_option(embedding: nn.Embedding) -> str | None:
    """Return the name of a set option that changes the weight in forward, or its gradient; None if there is none."""
    options = {"max_norm": embedding.max_norm is not None, "scale_grad_by_freq": embedding.scale_grad_by_freq}
    options["sparse"] = embedding.sparse
    return next((name for name, is_set in options.items() if is_set), None)


def sharing(model: nn.Module, embedding: nn.Embedding) -> list[nn.Module]:
    """Return the other modules of a model that hold an embedding's weight."""
    return [
        module
        for module in model.modules()
        if module is not embedding and any(parameter is embedding.weight for parameter in module._parameters.values())
    ]
