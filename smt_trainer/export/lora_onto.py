"""Choose what the LoRA adapter of a delta of a quantised base goes onto. Imports no torch by itself.

With Q(W) the dequantised weights, and W' = Q(W) with the trained blocks in it, which training computed with:

    dequantized   D = W' - Q(W): the adapter goes onto the base quantised as in training, as PEFT and servers hold it,
                  and together they are the trained model. They compute Q(W) x + B A x where training computed W' x, so
                  each sum is rounded to the dtype of the products twice more; in 8 bits bitsandbytes also quantises the
                  inputs of these linears, which it did not do where blocks were trained
    original      D = the blocks - W: the adapter goes onto the weights that were quantised, a model that was never
                  trained as a whole (see `onto.py`)

Blocks in weights that the base did not quantise are the same either way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smt_trainer.delta.delta import Delta
from smt_trainer.delta.onto import DEQUANTIZED, check_onto, in_words, quantised_names
from smt_trainer.errors import SMTError
from smt_trainer.model.checkpoint import Checkpoint

# The largest relative error of rounding a number.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def check_lora_onto(delta: Delta, onto: str | None, checkpoint: Checkpoint) -> None:
    """Raise `SMTError` if `onto` is missing or does not apply, or a quantised base is given in quantised form."""
    if delta.quantization is not None and checkpoint.is_quantised:
        raise SMTError(
            f"{checkpoint.folder} is stored quantised, but an adapter is made from the checkpoint that was "
            "quantised. Give that one."
        )
    if delta.quantization is not None and onto is None:
        raise SMTError(
            f"the delta was trained on a quantised base ({in_words(delta.quantization)}). Choose what the adapter "
            "goes onto: onto='dequantized' (smt export --onto dequantized) for the base quantised as in training, "
            "which with the adapter gives the trained model; or onto='original' for the weights that were quantised, "
            "which gives a model that was never trained as a whole."
        )
    check_onto(delta, onto, is_quantised=checkpoint.is_quantised)


def quantised_values(
    delta: Delta, delta_folder: Path, onto: str | None, checkpoint: Checkpoint
) -> dict[str, np.ndarray]:
    """Return module -> Q(W) under its blocks [n, br, bc], where the adapter goes onto quantised weights.

    This loads the whole base, quantised as in training.

    Raises:
        SMTError: once quantised, the base has other values than in training.
    """
    names = quantised_names(delta) if onto == DEQUANTIZED else []
    if not names:
        return {}
    from smt_trainer.merging.dequantise import load_trained, values_under_blocks

    return values_under_blocks(load_trained(checkpoint, delta_folder, delta.quantization), delta, names)


def advice(delta: Delta, onto: str | None) -> str:
    """Return what to load the adapter onto, and how near the result is to the trained model; "" for a plain base."""
    if delta.quantization is None:
        return ""
    if onto != DEQUANTIZED:
        return " It goes onto the weights that were quantised, a model that was never trained as a whole."
    near = (
        f"rounds the outputs of these linears to {delta.weight_dtype} twice more, each time by at most "
        f"{ROUNDING[delta.weight_dtype]:.2g} of a value"
    )
    if delta.quantization.get("load_in_8bit"):
        near += ", and quantises their inputs to 8 bits, which training did not"
    return (
        f" It goes onto the base quantised as in training ({in_words(delta.quantization)}). Together they are the "
        f"trained model, except that adding the two products {near}."
    )
