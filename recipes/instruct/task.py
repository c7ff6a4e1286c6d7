"""Instruction tuning on the user's own data, measured by the loss of held-out responses.

The protocol of SPSFT, table 6, trains on 256 random records (`--train_records 256`) and evaluates zero-shot on other
tasks, for which `lm-evaluation-harness` reads the merged checkpoint.
"""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.completion_loss import completion_losses
from recipes.parts.evaluation import Evaluation
from recipes.parts.inference import evaluating
from recipes.parts.records import Record, cut, cut_validation, read_records, with_fields, without
from recipes.parts.task import Decoding, Splits

ALPACA_FIELDS = ("instruction", "input", "output")
HELD_OUT, LOSS = "held out", "loss"
MOST_TEST_RECORDS = 256
LARGEST_TEST_SHARE = 0.1
SEED = 20260101
"""Seed of the test set."""


class Instruct:
    """Records with an instruction, an input and a response; a `recipes.parts.task.Task`."""

    def __init__(self) -> None:
        self.name = "instruct"
        self.measures = {LOSS: "nats per token of the response"}

    def load(self, source: str | None, validation: int, seed: int) -> Splits:
        """Return the splits, with the question set "held out".

        The test records are a tenth of all, at most 256, and the same for every `seed`.

        Args:
            source: a JSON array of records as in Alpaca, or a data set of such records on the hub (its train split).
            validation: number of random train records moved to validation; 0 for none.
            seed: seed of that choice.

        Raises:
            FileNotFoundError: `source` is a JSON file that does not exist.
            ValueError: `source` is None, a record lacks a field, or there are too few records.
        """
        records = _read(source)
        test, train = cut(records, min(MOST_TEST_RECORDS, int(LARGEST_TEST_SHARE * len(records))), SEED)
        if len(test) < 2:
            raise ValueError(
                f"Expected 20 records or more in {source}, of which a tenth is held out; got {len(records)}."
            )
        distinct = without({HELD_OUT: train}, {HELD_OUT: test}, "test")
        rest, held_out = cut_validation(distinct, validation, seed)
        return Splits.of(rest[HELD_OUT], held_out, {HELD_OUT: test})

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, Dataset],
        decoding: Decoding,
    ) -> Evaluation:
        """Measure the loss of `model` on the responses of each set. Nothing is generated."""
        losses = {}
        with evaluating(model, sum(map(len, questions.values()))) as progress:
            for name, asked in questions.items():
                losses[name] = completion_losses(model, tokenizer, asked, decoding.batch_tokens, progress)
        return Evaluation({LOSS: losses}, texts={})


def _read(source: str | None) -> list[Record]:
    if source is None:
        raise ValueError(
            "Expected the data of the task 'instruct', got none. Pass a JSON file of records with the fields "
            f"{', '.join(ALPACA_FIELDS)}, or the name of a data set of such records on the hub."
        )
    path = Path(source)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"Expected a JSON file, got {source!r}, which does not exist. Correct the path.")
        return list(map(_record, read_records(path, ALPACA_FIELDS)))
    return list(map(_record, with_fields(list(load_dataset(source, split="train")), ALPACA_FIELDS, source)))


def _record(alpaca: Record) -> Record:
    # Joined, because the prompt shows only the input of a record that has one, without its instruction.
    question = f"{alpaca['instruction']}\n\n{alpaca['input']}".rstrip()
    return {"instruction": question, "input": "", "output": alpaca["output"], "answer": alpaca["output"]}


INSTRUCT = Instruct()
