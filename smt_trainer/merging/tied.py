"""Find tensors that a checkpoint stores twice and transformers ties on loading. Imports no torch."""

from typing import Any

from smt_trainer.model.checkpoint import Checkpoint, parts_of
from smt_trainer.model.names import layer_index


def tied_copies(key: str, checkpoint: Checkpoint, taken: set[str]) -> list[str]:
    """Return the other names under which a checkpoint stores a tensor that transformers ties.

    transformers ties input and output embeddings that are stored twice if the configuration says so and the values
    agree; likewise the bias of `BertLMPredictionHead`. If the configuration says nothing, the values alone decide.
    """
    place = checkpoint.tensors[key]
    if not may_tie(checkpoint.config or {}):
        return []
    return [
        name
        for name, other in checkpoint.tensors.items()
        if name not in taken
        and (other.dtype, other.shape) == (place.dtype, place.shape)
        and _can_be_tied(key, name, len(place.shape))
        and checkpoint.are_equal(key, name)
    ]


def may_tie(config: dict[str, Any]) -> bool:
    """Return whether a configuration says that input and output embeddings are tied, or says nothing of it."""
    said = [part["tie_word_embeddings"] for part in parts_of(config) if "tie_word_embeddings" in part]
    return not said or any(said)


def _can_be_tied(key: str, other: str, dimensions: int) -> bool:
    if dimensions == 2:
        return layer_index(key) == layer_index(other) == -1
    first, second = sorted((key, other), key=len)
    return second == f"{first.removesuffix('bias')}decoder.bias"
