"""The studies: what each asks, and the arms that answer it."""

from recipes.studies.parts.methods import METHODS
from recipes.studies.parts.study import SEEDS, UNTUNED, Arm, Study

SMALL, LARGE = 0.0084, 0.05
"""The paper's budget, and one near its largest (4.91 %), as fractions of all parameters."""

MORE_SEEDS = (*SEEDS, 4, 5, 6)
"""Seeds of arms that are too close for three seeds to tell apart."""

# Full fine-tuning has no float32 masters, so its weights must be in float32.
FULL = Arm("full fine-tuning", "full", dtype="float32")
RANDOM = Arm("random", "random", SMALL)
PAPER = Arm("the paper's, q/k/v", "smt", SMALL)
EACH_MODULE = Arm("the best of each module", "smt", SMALL, fields={"scope": "per_module"})
RANDOM_ALL = Arm("random, all linears", "smt-all", SMALL, fields={"score": "random"}, seeds=MORE_SEEDS)
# As many in each linear as in an arm that chooses by scope="per_module", which leaves k and v without blocks.
RANDOM_EACH = Arm(
    "random, as many in each linear",
    "smt-all",
    SMALL,
    fields={"score": "random", "scope": "per_module"},
    rate_of=RANDOM_ALL,
)
LOW_ALL = Arm("small inputs, all linears", "smt-low-all", SMALL, seeds=MORE_SEEDS)
SMT = {budget: Arm(f"SMT, {100 * budget:g} %", "smt", budget) for budget in (SMALL, LARGE)}


def smt(label: str, budget: float = SMALL, *, like: float = SMALL, **more) -> Arm:
    """Return a variant of SMT, trained at the rate that was tuned for SMT at the budget `like`."""
    return Arm(label, more.pop("method", "smt"), budget, rate_of=SMT[like], **more)


def compared(budget: float, methods) -> list[Arm]:
    """Return an arm for each method, each with its own tuned rate."""
    return [
        SMT[budget] if method == "smt" else Arm(f"{METHODS[method].label}, {100 * budget:g} %", method, budget)
        for method in methods
    ]


BASELINES = ("lora-all", "dora", "rslora", "miss", "shira", "super", "spsft", "spsft-taylor")

METHODS_STUDY = Study(
    "methods",
    "Which method learns most with equally many trained parameters?",
    (
        *compared(SMALL, ("smt", "lora")),
        UNTUNED,
        *compared(SMALL, ("random", "smt-all")),
        FULL,
        *compared(SMALL, BASELINES),
    ),
)

METHODS_LARGE = Study(
    "methods-large",
    "Which method learns most with 5 % of the parameters?",
    tuple(compared(LARGE, ("smt", "random", "lora", "smt-all", *BASELINES))),
)

PLATEAU = Study(
    "plateau",
    "Does SMT go on learning as the budget grows, where LoRA stops (SMT, table 3 and figure 3)?",
    (
        *(
            arm
            for budget, like in ((0.0043, SMALL), (0.0126, SMALL), (0.025, LARGE))
            for arm in (
                smt(f"SMT, {100 * budget:g} %", budget, like=like),
                Arm(
                    f"LoRA, {100 * budget:g} %",
                    "lora",
                    budget,
                    rate_of=Arm(f"LoRA, {100 * like:g} %", "lora", like),
                ),
            )
        ),
    ),
)

ANATOMY = Study(
    "anatomy",
    "Which projections should be offered (SMT, tables 4 and 6, figures 4 and 5)?",
    (
        SMT[SMALL],
        *(smt(f"{name} alone", fields={"target_modules": [f"{name}_proj"]}) for name in "qkvo"),
        smt("all of attention", fields={"target_modules": "attention"}),
        Arm("all linears", "smt-all", SMALL),
        Arm("MLP alone", "smt", SMALL, fields={"target_modules": "mlp"}),
        smt(
            "half MLP, half q/k/v",
            fields={
                "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
                "budget": {"qkv": SMALL / 2, "mlp": SMALL / 2},
            },
        ),
    ),
)

SPREAD = Study(
    "spread",
    "Should the blocks be the best of the whole model, or the best of each module?",
    (SMT[SMALL], EACH_MODULE, Arm("the smallest inputs of each module", "smt-low", SMALL), RANDOM),
)

INPUTS = Study(
    "inputs",
    "Should blocks be chosen where inputs are small, which moves the outputs least, and from all linears?",
    (
        LOW_ALL,
        RANDOM_ALL,
        RANDOM_EACH,
        Arm("LoRA, all linears", "lora-all", SMALL, seeds=MORE_SEEDS),
        PAPER,
        Arm("random, q/k/v", "random", SMALL),
        Arm("LoRA, q/k/v", "lora", SMALL),
        UNTUNED,
    ),
)

SENTIMENT = Study(
    "sentiment",
    "Does what holds for word problems hold for another task, the sentiment of film reviews?",
    (
        LOW_ALL,
        RANDOM_ALL,
        Arm("LoRA, all linears", "lora-all", SMALL),
        PAPER,
        FULL,
        UNTUNED,
    ),
    task="sentiment",
)

GRADIENT_ALL = Arm("`grad_l1`", "smt-all", SMALL, fields={"score": "grad_l1", "scope": "per_module"})

SCORES = Study(
    "scores",
    "Which score chooses the best blocks of each linear?",
    (
        RANDOM_ALL,
        RANDOM_EACH,
        LOW_ALL,
        GRADIENT_ALL,
        *(
            # Scores of gradients share the rate that was tuned for `grad_l1`.
            Arm(f"`{score}`", "smt-all", SMALL, fields=GRADIENT_ALL.fields | {"score": score}, rate_of=rate_of)
            for score, rate_of in (
                ("magnitude", None),
                ("activation", None),
                ("taylor", GRADIENT_ALL),
                ("grad_l2", GRADIENT_ALL),
                ("grad_signed", GRADIENT_ALL),
                ("grad_abs", GRADIENT_ALL),
            )
        ),
    ),
)

WARMUP = Study(
    "warmup",
    "How long must the warm-up be, and can a selection be used again?",
    (
        SMT[SMALL],
        *(
            smt("1 step" if steps == 1 else f"{steps} steps", fields={"smt_warmup_steps": steps})
            for steps in (1, 3, 30, 100)
        ),
        smt("10 steps on other records", selected_on="math:11"),
        smt("10 steps on the commonsense task", selected_on="commonsense:11"),
    ),
)

DEPTH = Study(
    "depth",
    "What does a step that stops early cost in quality?",
    (
        SMT[SMALL],
        *(smt(f"blocks from layer {layer} of 30 up", fields={"lowest_layer": layer}) for layer in (8, 15, 22)),
    ),
)

DEPTH_ALL = Study(
    "depth-all",
    "What does it cost where blocks are chosen from all linears?",
    (
        LOW_ALL,
        *(
            Arm(
                f"small inputs from layer {layer} of 30 up",
                "smt-low-all",
                SMALL,
                fields={"lowest_layer": layer},
                rate_of=LOW_ALL,
            )
            for layer in (15, 22)
        ),
    ),
)

BLOCK_SIZE = Study(
    "blocksize",
    "How large should blocks be?",
    (
        RANDOM_ALL,
        *(
            Arm(f"{label}, random", "smt-all", SMALL, fields={"score": "random"} | fields, rate_of=RANDOM_ALL)
            for label, fields in (
                *((f"{edge}x{edge}", {"block_size": edge}) for edge in (16, 32, 96, 192)),
                *((f"{kind}s", {"granularity": kind, "block_size": "auto"}) for kind in ("row", "column")),
            )
        ),
    ),
)

PRECISION = Study(
    "precision",
    "What do masters in float32 bring over weights in bfloat16?",
    (
        SMT[SMALL],
        smt("float32 weights and masters", dtype="float32"),
        smt("bfloat16 weights and masters", fields={"master_dtype": "bfloat16"}),
    ),
)

INIT = Study(
    "init",
    "Does updating all weights in the warm-up, as the authors' code does, help?",
    (
        smt("float32 weights and masters", dtype="float32"),
        smt("10 full steps first", method="full-warm-up", dtype="float32"),
    ),
)

RECORDS = Study(
    "records",
    "How many commonsense records does a model of 135M parameters need to learn from?",
    (
        UNTUNED,
        *(
            Arm(f"{label}, {records:,} records", method, budget, dtype=dtype, records=records, rate_of=arm)
            for method, label, budget, dtype in (
                ("full", "full", None, "float32"),
                ("smt", "SMT", LARGE, "bfloat16"),
                ("lora", "LoRA", LARGE, "bfloat16"),
            )
            for arm in (Arm(label, method, budget, records=8192, dtype=dtype),)
            for records in (2048, 8192, 32768)
        ),
    ),
    task="commonsense",
)

STUDIES = {
    study.name: study
    for study in (
        METHODS_STUDY,
        METHODS_LARGE,
        PLATEAU,
        ANATOMY,
        SPREAD,
        INPUTS,
        SENTIMENT,
        SCORES,
        WARMUP,
        DEPTH,
        DEPTH_ALL,
        BLOCK_SIZE,
        PRECISION,
        INIT,
        RECORDS,
    )
}
"""Name -> study. The runs of all studies also measure forgetting."""
