"""Write the merged checkpoint of a run, and compare it with the trained model."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.inference import inference
from recipes.parts.prompt import encode_prompt
from recipes.parts.task import Decoding, Task
from smt_trainer import from_delta
from smt_trainer.merging.logit_difference import LogitDifference, compare_logits


class Comparison(NamedTuple):
    """A merged model compared with the trained one.

    Attributes:
        onto: the weights of a quantised base that the delta was merged onto; None if the base is not quantised.
        equal: whether the logits of the prompts are bit-identical and the answers to the questions the same.
        moved: how far the logits are apart.
    """

    onto: str | None
    equal: bool
    moved: LogitDifference


def write_merged(base: str, delta: Path, output: Path, tokenizer: PreTrainedTokenizerBase, **loading: Any) -> None:
    """Write base plus delta as a plain checkpoint, replacing an earlier one.

    Args:
        loading: further arguments of `from_delta`: the dtype, and for a quantised base `onto`.
    """
    shutil.rmtree(output, ignore_errors=True)
    from_delta(delta, base=base, **loading).save_pretrained(output)
    tokenizer.save_pretrained(output)


def compare(
    task: Task,
    trained: PreTrainedModel,
    merged: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, Dataset],
    decoding: Decoding,
) -> tuple[bool, LogitDifference]:
    """Compare logits on the first prompt of each set, and the answers to all questions.

    Returns:
        Whether all are the same, and how far the logits are apart.
    """
    prompts = [torch.tensor(encode_prompt(records[0], tokenizer)) for records in questions.values()]
    with inference(trained), inference(merged):
        logits = [[model(ids[None].to(model.device)).logits for ids in prompts] for model in (trained, merged)]
        answers = [task.evaluate(model, tokenizer, questions, decoding) for model in (trained, merged)]
        equal = all(map(torch.equal, *logits)) and answers[0] == answers[1]
        return equal, compare_logits(trained, merged, prompts)
