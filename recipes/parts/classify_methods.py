"""The compared methods of fine-tuning a classifier. All train its new head whole (SPSFT, tables 2 to 5)."""

from recipes.parts.methods import Adapter, Full, Head, Sparse

ROWS = {"granularity": "row", "block_size": "auto"}

METHODS: dict[str, Full | Head | Adapter | Sparse] = {
    "full": Full("full fine-tuning"),
    "head": Head("head only"),
    "lora": Adapter("LoRA", "LoRA"),
    "dora": Adapter("DoRA", "DoRA"),
    "smt": Sparse("SMT blocks", {"score": "grad_l1"}),
    "magnitude": Sparse("SPSFT rows, magnitude", ROWS | {"score": "magnitude"}),
    "taylor": Sparse("SPSFT rows, taylor", ROWS | {"score": "taylor"}),
    "qm_taylor": Sparse("SPSFT rows, qm_taylor", ROWS | {"score": "qm_taylor"}),
    # SPSFT halves the ratio to make room for the columns (section 4.3).
    "dep": Sparse("SPSFT rows and dependents, taylor", ROWS | {"score": "taylor", "train_dependents": True}, share=0.5),
}
"""Name -> method."""
