"""A model's answers to the questions of one task, by generation and by likelihood.

Every output reads "the correct answer is X". The answers X of a task share their first tokens ("answer" in answer1 to
answer5). One pass over the prompt gives both kinds of answer:

    prompt + shared tokens -> logits at the last position -> the likeliest of the tokens that distinguish the X
    prompt                 -> keys and values of that pass, without the shared tokens -> generation
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.parts.tasks import Task
from recipes.commonsense.parts.templates import OUTPUT, named_answers
from recipes.parts.collator import attention, left_pad
from recipes.parts.inference import batches
from recipes.parts.prompt import encode_prompt


class Answer(NamedTuple):
    """The answer to one question: the generated text, and the likeliest label that the question offers."""

    text: str
    choice: str


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Dataset,
    generation: GenerationConfig,
    batch_tokens: int,
    progress: tqdm,
) -> list[Answer]:
    """Return the answers in the order of `questions`. `model` should be in evaluation mode.

    Args:
        generation: beams, length and special tokens of the generation.
        batch_tokens: most tokens in one batch of prompts, padding included.
        progress: advanced by one for each question.

    Raises:
        ValueError: no single token distinguishes the answers of `task`.
    """
    shared, token_of = distinguishing_tokens(task.answers, tokenizer)
    prompts = [encode_prompt(question, tokenizer) for question in questions]
    offered = [named_answers(instruction) for instruction in questions["instruction"]]
    answers = {}
    for batch in batches([len(prompt) for prompt in prompts], batch_tokens):
        rows = [prompts[index] for index in batch]
        logits, cache = _read(model, rows, shared, generation.pad_token_id)
        generated = _generate(model, rows, cache, generation)
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        for index, text, scores in zip(batch, texts, logits, strict=True):
            best = scores[[token_of[label] for label in offered[index]]].argmax()
            answers[index] = Answer(text, offered[index][best])
        progress.update(len(batch))
    return [answers[index] for index in range(len(prompts))]


def distinguishing_tokens(
    answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], dict[str, int]]:
    """Return the ids that the outputs of all `answers` share at the start, and the next id of each.

    The likelihood of an answer is the probability of that next id. If the outputs do not differ after it, for
    example because they end there, this ranks the answers like the likelihood of the whole output.

    Raises:
        ValueError: two answers have the same next id, or an answer has none.
    """
    outputs = {
        answer: tokenizer(OUTPUT.format(answer=answer), add_special_tokens=False).input_ids for answer in answers
    }
    columns = zip(*outputs.values(), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    tokens = {answer: ids[len(shared)] for answer, ids in outputs.items() if len(ids) > len(shared)}
    if len(set(tokens.values())) < len(answers):
        raise ValueError(
            f"Expected one token to tell the answers {', '.join(answers)} apart; got {tokens} after "
            f"{tokenizer.decode(shared)!r}. Use a tokenizer that splits numbers into digits."
        )
    return shared, tokens


def _read(
    model: PreTrainedModel, prompts: list[list[int]], shared: list[int], pad_id: int
) -> tuple[torch.Tensor, DynamicCache]:
    """Return the logits after prompt and shared tokens, (questions, vocabulary), and the cache of the prompts.

    The cache omits the last prompt token, because `generate` reads it to find the first new token.
    """
    rows = [prompt + shared for prompt in prompts]
    inputs = {"input_ids": left_pad(rows, pad_id), **attention(rows)}
    cache = DynamicCache(config=model.config)
    output = model(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.crop(-len(shared) - 1)
    return output.logits[:, -1], cache


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], cache: DynamicCache, generation: GenerationConfig
) -> torch.Tensor:
    """Return the new ids, (questions, at most `generation.max_new_tokens`)."""
    # `generate` repeats the ids for its beams, but not a given cache.
    cache.batch_repeat_interleave(generation.num_beams)
    ids = left_pad(prompts, generation.pad_token_id).to(model.device)
    mask = attention(prompts)["attention_mask"].to(model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=generation)
    return output[:, ids.shape[1] :]
