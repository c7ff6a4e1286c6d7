"""`SMTConfig`: what to tune, how much of it, and how to choose it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from smt_trainer.errors import SMTError

SCORES = (
    "grad_l1",
    "grad_l2",
    "grad_signed",
    "grad_abs",
    "taylor",
    "qm_taylor",
    "activation",
    "magnitude",
    "random",
)
# How the authors' released code calls scores; its `mean_abs` takes the absolute value of the mean, and its `L1` sums
# where `grad_l1` takes the mean, which ranks blocks of one size alike.
SCORE_ALIASES = {"mean_abs": "grad_signed", "abs_mean": "grad_l1", "L1": "grad_l1", "L2": "grad_l2"}
SCOPES = ("global", "per_module")
DENOMINATORS = ("model", "targets")
GRANULARITIES = ("block", "row", "column")
ACCUMULATOR_DEVICES = ("auto", "device", "cpu")
ACCUMULATOR_DTYPES = ("float32", "bfloat16")
MASTER_DTYPES = ("float32", "bfloat16", "float16", "float64")

# What a resumed run may change: neither alters which weights are trained nor how.
_FREE_ON_RESUME = ("selection", "accumulator_device")
# What decides how chosen blocks are trained, and what else, rather than which are chosen.
TRAINING_FIELDS = ("master_dtype", "modules_to_save", "train_norm", "train_bias")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SMTConfig:
    """How Sparse Matrix Tuning chooses and trains the blocks of a model.

    The defaults are those of the paper ("Sparse Matrix in Large Language Model Fine-tuning", sections 3.1 and 4.1):
    query, key and value projections, blocks of 256x256 where the model's shapes allow, 0.84 % of the parameters,
    100 warm-up steps, mean absolute value of the summed gradient.

    Raises:
        SMTError: a field has a value outside its range; all fields are checked together at construction.
    """

    target_modules: str | list[str] = field(
        default="qkv",
        metadata=_help(
            "Linears to choose blocks from: 'qkv' (query, key and value projections, fused or not), 'attention' (and "
            "the output projection), 'mlp', 'all-linear' (all but output embeddings and heads), a list of module "
            "names or their endings, or a regular expression that the whole module name must match."
        ),
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata=_help("Linears to leave out: names or their endings, or a regular expression.")
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata=_help(
            "Modules to train whole and store in the delta. Default: the new head of a sequence or token "
            "classification model, nothing otherwise. An empty list trains no module whole."
        ),
    )
    train_norm: bool = field(
        default=False,
        metadata=_help(
            "Train the normalisation layers whole, too: those of the layers from lowest_layer on, and any outside."
        ),
    )
    train_bias: bool = field(
        default=False, metadata=_help("Train the biases of the linears that have blocks whole, too.")
    )
    block_size: str | int | tuple[int, int] = field(
        default="auto",
        metadata=_help(
            "Edge of a block in weights, or a pair (rows, columns) of out and in features. 'auto': the largest common "
            "divisor, at most 256, of the dimensions of all targeted weights."
        ),
    )
    granularity: str = field(
        default="block",
        metadata=_help("'block' (SMT), 'row' (SPSFT: blocks of 1 x in_features) or 'column' (out_features x 1)."),
    )
    train_dependents: bool = field(
        default=False,
        metadata=_help(
            "With granularity='row', train with each chosen row the columns of other linears that read nothing but "
            "what the row computes (SPSFT's 'dep'). They come on top of the budget, about as much again: SPSFT halves "
            "it. A linear with such columns gives no rows itself."
        ),
    )
    budget: float | int | dict[str, float | int] = field(
        default=0.0084,
        metadata=_help(
            "How much to train. A float in (0, 1]: fraction of all model parameters (tied weights counted once), "
            "rounded to the nearest block. An int: number of blocks (with scope='per_module': in each module). A dict "
            "(written attention=0.0042,mlp=100): a budget of its own for each group of targets, ranked apart from the "
            "others; groups are 'qkv', 'attention', 'mlp' or names of modules or their endings."
        ),
    )
    budget_of: str = field(
        default="model",
        metadata=_help(
            "What a fraction in the budget is of: 'model' (all its parameters) or 'targets' (the weights of all "
            "targets together)."
        ),
    )
    lowest_layer: int = field(
        default=0, metadata=_help("Choose blocks only in layers with this index or above; backward stops there.")
    )
    layer_cap: int | float | None = field(
        default=None,
        metadata=_help(
            "The most that may be chosen in any one layer. An int: number of blocks. A float in (0, 1]: fraction of "
            "the layer's targeted weights. With budgets by groups it holds for each group by itself."
        ),
    )
    smt_warmup_steps: int = field(
        default=100, metadata=_help("Batches, each as large as an optimizer step, over which gradients are summed.")
    )
    accumulator_device: str = field(
        default="auto",
        metadata=_help(
            "Where the summed gradients of the warm-up live: 'device' (beside the weights), 'cpu', or 'auto' (the "
            "device if they take at most half of its free memory)."
        ),
    )
    accumulator_dtype: str = field(
        default="float32",
        metadata=_help(
            "Dtype of the summed gradients of 'grad_l1' and 'grad_l2': 'float32', or 'bfloat16', which takes half the "
            "memory and rounds each addition to 8 bits."
        ),
    )
    score: str = field(
        default="grad_l1",
        metadata=_help(
            f"How blocks are ranked: one of {', '.join(SCORES)}. The names in the authors' code are understood, too: "
            f"{', '.join(f'{alias} ({score})' for alias, score in SCORE_ALIASES.items())}."
        ),
    )
    class_column: str | None = field(
        default=None,
        metadata=_help(
            "Column of the training data that holds the class of an example, for the score 'qm_taylor'. Default: its "
            "label; with a label for each token, the first that is not -100."
        ),
    )
    scope: str = field(
        default="global",
        metadata=_help("'global': the best blocks of all targets together; 'per_module': the best of each module."),
    )
    selection: Any = field(
        default=None,
        metadata=_help(
            "Train without a warm-up: on a BlockSelection, on the path of its JSON file, or on what the other fields "
            "choose from a scores file (.safetensors)."
        ),
    )
    master_dtype: str = field(
        default="float32",
        metadata=_help(f"Dtype of the trainable copy of the blocks: one of {', '.join(MASTER_DTYPES)}."),
    )

    def __post_init__(self) -> None:
        self.target_modules = _names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = (
                [self.modules_to_save] if isinstance(self.modules_to_save, str) else list(self.modules_to_save)
            )
        if isinstance(self.block_size, list):
            self.block_size = tuple(self.block_size)
        if isinstance(self.budget, dict):
            self.budget = dict(self.budget)
        if isinstance(self.score, str):
            self.score = SCORE_ALIASES.get(self.score, self.score)
        if isinstance(self.selection, Path):
            self.selection = str(self.selection)
        self._validate()

    def _validate(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("score", self.score, SCORES, SCORE_ALIASES)
        _one_of("scope", self.scope, SCOPES)
        _one_of("budget_of", self.budget_of, DENOMINATORS)
        _one_of("accumulator_device", self.accumulator_device, ACCUMULATOR_DEVICES)
        _one_of("accumulator_dtype", self.accumulator_dtype, ACCUMULATOR_DTYPES)
        if self.class_column is not None and not (isinstance(self.class_column, str) and self.class_column):
            raise SMTError(f"class_column must be the name of a column or None, got {self.class_column!r}.")
        _one_of("master_dtype", self.master_dtype, MASTER_DTYPES)
        _expect_bool("train_norm", self.train_norm)
        _expect_bool("train_bias", self.train_bias)
        _expect_bool("train_dependents", self.train_dependents)
        if self.train_dependents and self.granularity != "row":
            raise SMTError(
                f"train_dependents=True needs granularity='row', got {self.granularity!r}: columns depend on rows."
            )
        _at_least("lowest_layer", self.lowest_layer, 0)
        _at_least("smt_warmup_steps", self.smt_warmup_steps, 1)
        _check_block_size(self.block_size, self.granularity)
        check_budget(self.budget)
        if self.layer_cap is not None and not _is_amount(self.layer_cap):
            raise SMTError(
                "layer_cap must be an int >= 1 (number of blocks), a float in (0, 1] (fraction of the layer's targeted "
                f"weights) or None, got {self.layer_cap!r}."
            )

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
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SMTError(f"SMTConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")
        return cls(**values)

    def to_json(self) -> str:
        """The configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SMTConfig:
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def differences(self, other: SMTConfig) -> list[str]:
        """`field: ours != theirs` for every field that decides which weights are trained and how."""
        ours, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {ours[name]!r} != {theirs[name]!r}"
            for name in ours
            if name not in _FREE_ON_RESUME and ours[name] != theirs[name]
        ]


def parse_budget(text: str) -> float | int | dict[str, float | int]:
    """A budget written as text: `"100"` is a count of blocks, `"0.0084"` or `"1e-2"` a fraction, and
    `"attention=0.0042,mlp=100"` a budget for each group.

    Raises:
        SMTError: the text is no budget, a number is out of range, or a group is named twice.
    """
    if "=" not in text:
        return check_budget(parse_amount("budget", text))
    pairs = [pair.partition("=") for pair in text.split(",")]
    budgets = {group.strip(): parse_amount("budget", amount) for group, _, amount in pairs}
    if len(budgets) < len(pairs):
        raise SMTError(f"budget names a group twice: {text!r}. Give each group one budget.")
    return check_budget(budgets)


def parse_amount(name: str, text: str) -> float | int:
    """A count such as `"100"`, or a fraction such as `"0.0084"`. Raises `SMTError` for anything but a number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise SMTError(f"{name} must be a count of blocks such as 100 or a fraction such as 0.0084, got {text!r}.")


def check_budget(budget: Any) -> Any:
    """The budget itself, if it is a count >= 1, a fraction in (0, 1] or a dict of these by group; raises `SMTError`
    otherwise."""
    by_group = isinstance(budget, dict) and budget and all(isinstance(group, str) and group for group in budget)
    amounts = {f"budget[{group!r}]": amount for group, amount in budget.items()} if by_group else {"budget": budget}
    for label, amount in amounts.items():
        if not _is_amount(amount):
            raise SMTError(
                f"{label} must be a float in (0, 1] (fraction of the parameters) or an int >= 1 (number of blocks)"
                f"{'' if by_group else ', or a dict of these by group'}, got {amount!r}."
            )
    return budget


def _names(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (list, tuple, set)) and value and all(isinstance(item, str) and item for item in value):
        return sorted(value) if isinstance(value, set) else list(value)
    raise SMTError(f"{name} must be a name, a regular expression or a non-empty list of names, got {value!r}.")


def _one_of(name: str, value: Any, known: Iterable[str], aliases: Iterable[str] = ()) -> None:
    if value not in known:
        also = f" (or {', '.join(aliases)})" if aliases else ""
        raise SMTError(f"{name} must be one of {', '.join(known)}{also}, got {value!r}.")


def _expect_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SMTError(f"{name} must be True or False, got {value!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    """Whether a value is a count >= 1 or a fraction in (0, 1]."""
    return (_is_int(value) and value >= 1) or (isinstance(value, float) and 0.0 < value <= 1.0)


def _at_least(name: str, value: Any, least: int) -> None:
    if not _is_int(value) or value < least:
        raise SMTError(f"{name} must be an int >= {least}, got {value!r}.")


def _check_block_size(block_size: Any, granularity: str) -> None:
    if block_size == "auto":
        return
    if granularity != "block":
        raise SMTError(
            f"granularity={granularity!r} fixes the block's shape; leave block_size at 'auto', got {block_size!r}."
        )
    edges = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(edges) != 2 or not all(_is_int(edge) and edge >= 1 for edge in edges):
        raise SMTError(f"block_size must be 'auto', an int >= 1 or a pair (rows, columns) of them, got {block_size!r}.")
