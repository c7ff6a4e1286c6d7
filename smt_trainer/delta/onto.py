"""Choose what a delta of a quantised base is put into. Imports no torch.

In training, the model computed with the dequantised weights with the blocks in them. There are three ways to use them:

    apart          the base quantised as in training, and the blocks separate: exactly the trained model
    dequantized    the dequantised weights with the blocks in them, in 16 bits: the trained model, if it computed in the
                   dtype of the checkpoint; 8 bits also quantise the inputs of the other linears, which this leaves out
    original       the weights that were quantised, with the blocks in them: a model that was never trained as a whole,
                   since the blocks were chosen and trained among rounded weights

Blocks of weights that the base did not quantise are written into these weights in all three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smt_trainer.errors import SMTError, printable

if TYPE_CHECKING:
    from smt_trainer.delta.delta import Delta

ORIGINAL, DEQUANTIZED = "original", "dequantized"
WAYS = (
    "Choose a model: onto='dequantized' (smt merge --onto dequantized) makes the quantised weights dense, which gives "
    "the trained model in 16 bits; onto='original' uses the weights that were quantised, which gives a model that was "
    "never trained as a whole. To get exactly the trained model, keep base and blocks apart: from_delta(delta, "
    "quantization_config=...), or load_delta into the base, quantised as in training."
)
# Fields of a `quantization_config` that change the values of quantised weights.
DECIDING = ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def quantised_names(delta: Delta) -> list[str]:
    """Return the modules whose blocks lie in weights that were quantised in training."""
    return [name for name in delta.block_arrays if f"{name}.weight" in delta.fingerprint.codes]


def check_onto(delta: Delta, onto: str | None, *, is_quantised: bool) -> None:
    """Raise `SMTError` if `onto` is missing for a delta of a quantised base and a plain one at hand, or does not apply.

    Args:
        delta: what is put into the base.
        onto: as the user gave it.
        is_quantised: whether the base at hand is quantised.
    """
    if onto not in (None, ORIGINAL, DEQUANTIZED):
        raise SMTError(f"onto must be {ORIGINAL!r} or {DEQUANTIZED!r}, got {onto!r}.")
    if delta.quantization is None:
        if is_quantised:
            raise SMTError(
                "the delta was trained on a base that was not quantised, and this one is. Load it without "
                "quantization_config; the merged model can be quantised afterwards."
            )
        if onto is not None:
            raise SMTError(f"onto={onto!r} is for deltas of a quantised base; this delta's was plain. Leave it out.")
        return
    if is_quantised and onto == ORIGINAL:
        raise SMTError(
            "this base is quantised; onto='original' needs the checkpoint that was quantised. Give that one."
        )
    if not is_quantised and onto is None:
        raise SMTError(f"the delta was trained on a quantised base ({in_words(delta.quantization)}). {WAYS}")


def check_same_quantisation(delta: Delta, found: dict[str, Any]) -> None:
    """Raise `SMTError` if a quantised base was quantised in another way than in training."""
    expected = delta.quantization or {}
    differing = [key for key in DECIDING if expected.get(key) != found.get(key)]
    if differing:
        raise SMTError(
            f"the delta's base was quantised in another way ({in_words(expected)}) than this one ({in_words(found)}): "
            f"{', '.join(differing)} differ. Quantise it as in training."
        )


def in_words(quantization: dict[str, Any]) -> str:
    """Return how a base was quantised, such as "bitsandbytes, 4 bits, nf4, double"."""
    words = [quantization.get("quant_method")]
    if quantization.get("load_in_4bit"):
        words += ["4 bits", quantization.get("bnb_4bit_quant_type")]
        words += ["double"] * bool(quantization.get("bnb_4bit_use_double_quant"))
    elif quantization.get("load_in_8bit"):
        words.append("8 bits")
    return printable(", ".join(map(str, words)))
