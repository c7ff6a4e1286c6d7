"""The merged checkpoint of a run, and whether it is the trained model."""

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
from smt_trainer.merging.moved import Moved, moved


class Comparison(NamedTuple):
    """A merged model beside the trained one.

    Attributes:
        equal: whether the logits of the prompts are bit-identical and the answers to the questions the same.
        moved: how far the logits are apart.
    """

    equal: bool
    moved: Moved


def write_merged(base: str, delta: Path, output: Path, tokenizer: PreTrainedTokenizerBase, **loading: Any) -> None:
    """Write base plus delta as a plain checkpoint, replacing an earlier one.

    Args:
        loading: more for `from_delta`: the dtype, and for a quantised base what the delta is put onto.
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
) -> Comparison:
    """Compare logits on the first prompt of each set, and the answers to all questions."""
    prompts = [torch.tensor(encode_prompt(records[0], tokenizer)) for records in questions.values()]
    with inference(trained), inference(merged):
        logits = [[model(ids[None].to(model.device)).logits for ids in prompts] for model in (trained, merged)]
        answers = [task.evaluate(model, tokenizer, questions, decoding) for model in (trained, merged)]
        equal = all(map(torch.equal, *logits)) and answers[0] == answers[1]
        return Comparison(equal, moved(trained, merged, prompts))
