"""`SMTConfig`: what to tune, how much of it, and how to choose it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from smt_trainer.errors import SMTError
from smt_trainer.settings import (
    Amount,
    BlockSize,
    Budget,
    Choice,
    Decides,
    Flag,
    Integer,
    Name,
    NameList,
    Names,
    SelectionSource,
    describe,
    setting,
    settings,
)

if TYPE_CHECKING:
    from smt_trainer.selection.block_selection import BlockSelection

    ModuleNames = str | list[str]
    BlockEdges = str | int | tuple[int, int]
    BlockBudget = float | int | dict[str, float | int]
    LayerCap = float | int
    Selection = BlockSelection | dict[str, Any] | str
else:
    # `HfArgumentParser` reads a field's type at run time. It gives these as text, which the kind of the field reads.
    ModuleNames = list[str]
    BlockEdges = BlockBudget = LayerCap = Selection = str

SCORES = (
    "grad_l1",
    "grad_l2",
    "grad_signed",
    "grad_abs",
    "taylor",
    "qm_taylor",
    "activation",
    "low_activation",
    "magnitude",
    "random",
)
# The names of scores in the authors' released code. Its `mean_abs` takes the absolute value of the mean. Its `L1` sums
# where `grad_l1` takes the mean, which ranks blocks of one size alike.
SCORE_ALIASES = {"mean_abs": "grad_signed", "abs_mean": "grad_l1", "L1": "grad_l1", "L2": "grad_l2"}
TARGET_KEYWORDS = ("qkv", "attention", "mlp", "experts", "all-linear", "all-conv")


@dataclass
class SMTConfig:
    """How Sparse Matrix Tuning chooses and trains the blocks of a model.

    The defaults are those of the paper ("Sparse Matrix in Large Language Model Fine-tuning", sections 3.1 and 4.1):
    query, key and value projections, blocks of 256x256 where the model's shapes allow, 0.84 % of the parameters, mean
    absolute value of the summed gradient; but 10 warm-up steps, which choose as well as the paper's 100
    (recipes/studies/results/warmup.md). `SMTConfig.paper` has those. On the one model studied, others learned more:
    score='low_activation', scope='per_module', target_modules='all-linear', block_size=64, at a rate of their own.

    `HfArgumentParser((SMTConfig, TrainingArguments))` and TRL's `TrlParser` parse it from a command line or YAML.

    Raises:
        SMTError: a field has a value outside its range; all fields are checked at construction.
    """

    target_modules: ModuleNames = setting(
        "qkv",
        Names(*TARGET_KEYWORDS),
        decides="targets",
        help="Linears to choose blocks from: 'qkv' (query, key and value projections, fused or not), 'attention' (qkv "
        "and the output projection), 'mlp' (experts included), 'experts' or 'all-linear' (all but heads and routers); "
        "in a VLM these mean its language model. 'all-conv' chooses convolutions instead. A list of module names or "
        "their endings, or a regular expression for the whole name, can also choose convolutions and embeddings (a "
        "row is a token).",
    )
    exclude_modules: ModuleNames | None = setting(
        None,
        Names(),
        decides="targets",
        help="Linears to leave out: names or their endings, of linears or of modules around them, or a regular "
        "expression that the whole name of a linear must match.",
    )
    lowest_layer: int = setting(
        0,
        Integer(least=0),
        decides="targets",
        help="Choose blocks only in layers with this index or above; backward stops there.",
    )
    budget: BlockBudget = setting(
        0.0084,
        Budget(),
        decides="choice",
        help="How much to train. A float in (0, 1]: fraction of all model parameters (tied weights counted once), "
        "rounded to the nearest block. An int: number of blocks (with scope='per_module': in each module). A dict "
        "(written attention=0.0042,mlp=100): a budget for each group of targets, ranked apart from the others; groups "
        "are 'qkv', 'attention', 'mlp', 'experts' or names of modules or their endings.",
    )
    budget_of: str = setting(
        "model",
        Choice("model", "targets"),
        decides="choice",
        help="What a fraction in the budget refers to: 'model' (all its parameters) or 'targets' (the weights of all "
        "targets together).",
    )
    layer_cap: LayerCap | None = setting(
        None,
        Amount(fraction_of="the layer's targeted weights"),
        decides="choice",
        help="The most that may be chosen in any one layer. An int: number of blocks. A float in (0, 1]: fraction of "
        "the layer's targeted weights. With budgets by group the cap holds in each group separately.",
    )
    rank_cap: int | None = setting(
        None,
        Integer(least=1),
        decides="choice",
        help="The most rows or columns (whichever are fewer) that the blocks of any one module may touch, which is the "
        "rank of its change as LoRA. A whole number of blocks fits: rounded down.",
    )
    scope: str = setting(
        "global",
        Choice("global", "per_module"),
        decides="choice",
        help="Which blocks compete: those of all targets together ('global'), or those of each module ('per_module').",
    )
    score: str = setting(
        "grad_l1",
        Choice(*SCORES, aliases=SCORE_ALIASES),
        decides="scores",
        help=f"How blocks are ranked: one of {', '.join(SCORES)}. The names in the authors' code work as well: "
        f"{', '.join(f'{alias} ({score})' for alias, score in SCORE_ALIASES.items())}.",
    )
    block_size: BlockEdges = setting(
        "auto",
        BlockSize(),
        decides="scores",
        help="Edge of a block in weights. As 64x32: its rows and columns, out and in features. 'auto': the largest "
        "common divisor, at most 256, of the dimensions of all targeted weights.",
    )
    granularity: str = setting(
        "block",
        Choice("block", "row", "column"),
        decides="scores",
        help="Shape of a block: 'block' (SMT), 'row' (SPSFT: 1 x in_features) or 'column' (out_features x 1).",
    )
    train_dependents: bool = setting(
        False,
        Flag(),
        decides="scores",
        help="With granularity='row', also train the columns of other linears that read only what a chosen row "
        "computes (SPSFT's 'dep'). They come on top of the budget and about double it: SPSFT halves the budget for "
        "them. A linear with such columns gives no rows itself.",
    )
    smt_warmup_steps: int = setting(
        10,
        Integer(least=1),
        decides="warm-up",
        help="Steps of the gradient warm-up. Each takes as many examples as an optimizer step; no weight changes.",
    )
    class_column: str | None = setting(
        None,
        Name("a column"),
        decides="warm-up",
        help="Column of the training data that holds the class of an example, for the score 'qm_taylor'. Default: its "
        "label; with a label for each token, the first that is not -100.",
    )
    accumulator_dtype: str = setting(
        "float32",
        Choice("float32", "bfloat16"),
        decides="warm-up",
        help="Dtype of the summed gradients of 'grad_l1' and 'grad_l2': 'float32', or 'bfloat16', which takes half the "
        "memory and rounds each addition to 8 bits.",
    )
    accumulator_device: str = setting(
        "auto",
        Choice("auto", "device", "cpu"),
        decides="run",
        help="Where the summed gradients of the warm-up live: 'device' (beside the weights), 'cpu', or 'auto' (the "
        "device if they take at most half of its free memory).",
    )
    selection: Selection | None = setting(
        None,
        SelectionSource(),
        decides="run",
        help="Train without a warm-up: on a BlockSelection, on the path of its JSON file or of a folder with an "
        "smt_selection.json, or on what the other fields choose from a scores file (.safetensors).",
    )
    modules_to_save: list[str] | None = setting(
        None,
        NameList(),
        decides="training",
        help="Modules to train whole and store in the delta. Default: the new head of a model that classifies, chooses "
        "or finds answers, nothing otherwise. An empty list trains no module whole. Rows that a resized vocabulary has "
        "more than the checkpoint are trained beside the budget, unless the embeddings are named here.",
    )
    train_norm: bool = setting(
        False,
        Flag(),
        decides="training",
        help="Also train the normalisation layers whole: those from lowest_layer on, and those outside the layers. The "
        "running statistics of batch normalisation change in training in any case, and are stored in the delta.",
    )
    train_bias: bool = setting(
        False, Flag(), decides="training", help="Also train the biases of the linears that have blocks."
    )
    master_dtype: str = setting(
        "float32",
        Choice("float32", "bfloat16", "float16", "float64"),
        decides="training",
        help="Dtype of the trainable copy of the blocks.",
    )

    def __post_init__(self) -> None:
        for name, field in settings(self).items():
            setattr(self, name, field.take(name, getattr(self, name)))
        if self.block_size != "auto" and self.granularity != "block":
            raise SMTError(
                f"granularity={self.granularity!r} fixes the block's shape; leave block_size at 'auto', got "
                f"{self.block_size!r}."
            )
        if self.train_dependents and self.granularity != "row":
            raise SMTError(
                f"train_dependents=True needs granularity='row', got {self.granularity!r}: columns depend on rows."
            )
        if self.train_dependents and self.rank_cap is not None:
            raise SMTError(
                f"rank_cap={self.rank_cap} cannot hold for columns that depend on rows of several modules. Leave it "
                "out, or train_dependents at False."
            )

    @classmethod
    def paper(cls, **values: Any) -> SMTConfig:
        """The paper's values for all fields but those given (section 4.1)."""
        values.setdefault("smt_warmup_steps", 100)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; a `BlockSelection` becomes its own dictionary."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if hasattr(self.selection, "to_dict"):
            values["selection"] = self.selection.to_dict()
        if isinstance(self.block_size, tuple):
            values["block_size"] = list(self.block_size)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SMTConfig:
        """Inverse of `to_dict`. Raises `SMTError` for an unknown field or a value out of range."""
        if not isinstance(values, dict):
            raise SMTError(f"a configuration must be an object of fields and values, got {type(values).__name__}.")
        unknown = sorted(set(values) - set(settings(cls)))
        if unknown:
            raise SMTError(f"SMTConfig has no field {', '.join(unknown)}; its fields are {', '.join(settings(cls))}.")
        return cls(**values)

    def differences(self, other: SMTConfig) -> list[str]:
        """`field: ours != theirs` for every field that decides which weights are trained and how."""
        ours, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {ours[name]!r} != {theirs[name]!r}"
            for name, field in settings(self).items()
            if field.decides != "run" and ours[name] != theirs[name]
        ]

    @classmethod
    def deciding(cls, *what: Decides) -> list[str]:
        """Names of the fields that decide one of these."""
        return [name for name, field in settings(cls).items() if field.decides in what]


SMTConfig.__doc__ = f"{SMTConfig.__doc__}\nFields:\n\n{describe(SMTConfig)}\n"
