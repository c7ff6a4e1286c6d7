"""The methods compared in the studies. All are trained on the same records in the same order."""

from recipes.parts.methods import Adapter, Full, Sparse

COMMON = {"block_size": 64, "smt_warmup_steps": 10}
"""Fields of SMTConfig: blocks of 64x64 meet a budget to within 1 %."""

ROWS = COMMON | {"granularity": "row", "block_size": "auto"}

LOW = COMMON | {"score": "low_activation", "scope": "per_module"}

METHODS: dict[str, Full | Adapter | Sparse] = {
    "full": Full("full fine-tuning"),
    "smt": Sparse("SMT", COMMON),
    "random": Sparse("random blocks", COMMON | {"score": "random"}),
    "smt-low": Sparse("SMT, small inputs", LOW),
    "smt-low-all": Sparse("SMT, small inputs, all linears", LOW | {"target_modules": "all-linear"}),
    "lora": Adapter("LoRA", "LoRA"),
    "dora": Adapter("DoRA", "DoRA"),
    "rslora": Adapter("rsLoRA", "rsLoRA"),
    "miss": Adapter("MiSS", "MiSS"),
    "shira": Adapter("SHiRA", "SHiRA"),
    "super": Adapter("Super-Tuning", "Super-Tuning"),
    "spsft": Sparse("SPSFT rows, magnitude", ROWS | {"score": "magnitude"}),
    "spsft-taylor": Sparse("SPSFT rows, taylor", ROWS | {"score": "taylor"}),
    "smt-all": Sparse("SMT, all linears", COMMON | {"target_modules": "all-linear"}),
    "lora-all": Adapter("LoRA, all linears", "LoRA", "all-linear"),
    "full-warm-up": Sparse("SMT after full steps", COMMON),
}
"""Name -> method."""
