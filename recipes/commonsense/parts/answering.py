"""A model's answers to the questions of one set, by generation and by likelihood.

Every output reads "the correct answer is X". The answers X of a set share their first tokens ("answer" in answer1 to
answer5). One pass over the prompt gives both kinds of answer:

    prompt + shared tokens -> scores at the last position -> the likeliest of the tokens that distinguish the X
    prompt                 -> keys and values of that pass, without the shared tokens -> generation
"""

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.parts.templates import OUTPUT, named_answers
from recipes.parts.answer_scores import last_scores
from recipes.parts.collator import attention, left_pad
from recipes.parts.generation import generation_config
from recipes.parts.inference import batches
from recipes.parts.prompt import encode_prompt, pad_token
from recipes.parts.task import Decoding


class Answer(NamedTuple):
    """The answer to one question: the likeliest label that it offers, and the generated text, "" without generation."""

    choice: str
    text: str


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    questions: Dataset,
    decoding: Decoding,
    progress: tqdm,
) -> list[Answer]:
    """Return the answers in the order of `questions`. `model` should be in evaluation mode.

    Args:
        labels: all labels that a question of this set may offer.
        progress: advanced by one for each question.

    Raises:
        ValueError: no single token distinguishes the outputs of `labels`.
    """
    shared, token_of = distinguishing_tokens(labels, tokenizer)
    prompts = [encode_prompt(question, tokenizer) for question in questions]
    offered = [named_answers(instruction) for instruction in questions["instruction"]]
    answers = {}
    for batch in batches([len(prompt) for prompt in prompts], decoding.batch_tokens):
        rows = [prompts[index] for index in batch]
        cache = DynamicCache(config=model.config) if decoding.generate else None
        scores = _read(model, rows, shared, list(token_of.values()), pad_token(tokenizer), cache)
        texts = [""] * len(batch) if cache is None else _generate(model, tokenizer, rows, cache, decoding)
        for index, text, row in zip(batch, texts, scores.tolist(), strict=True):
            score_of = dict(zip(token_of, row, strict=True))
            answers[index] = Answer(max(offered[index], key=score_of.__getitem__), text)
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
    model: PreTrainedModel,
    prompts: list[list[int]],
    shared: list[int],
    tokens: list[int],
    pad_id: int,
    cache: DynamicCache | None,
) -> torch.Tensor:
    """Return the scores of `tokens` after prompt and shared tokens, (questions, tokens). Fill the cache, if given.

    The cache omits the last prompt token, because `generate` reads it to find the first new token.
    """
    rows = [prompt + shared for prompt in prompts]
    inputs = {"input_ids": left_pad(rows, pad_id), **attention(rows)}
    scores = last_scores(
        model,
        tokens,
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **{cache_argument(model): cache},
        use_cache=cache is not None,
    )
    if cache is not None:
        cache.crop(-len(shared) - 1)
    return scores


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    cache: DynamicCache,
    decoding: Decoding,
) -> list[str]:
    """Return the text after each prompt, whose keys and values are in the cache."""
    generation = generation_config(tokenizer, decoding)
    # `generate` repeats the ids for its beams, but not a given cache.
    cache.batch_repeat_interleave(decoding.num_beams)
    ids = left_pad(prompts, generation.pad_token_id).to(model.device)
    mask = attention(prompts)["attention_mask"].to(model.device)
    own = {cache_argument(model): cache}
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation, **own)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def cache_argument(model: PreTrainedModel) -> str:
    """Return what a model's forward calls its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
