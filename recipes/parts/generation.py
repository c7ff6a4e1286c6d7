"""Generate texts after the prompts of records."""

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.collator import attention, left_pad
from recipes.parts.inference import batches
from recipes.parts.prompt import encode_prompt, pad_token
from recipes.parts.task import Decoding


def generation_config(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """Return the settings of `generate`, with the special tokens of `tokenizer`."""
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=False,
        # Otherwise `generate` falls back on the model's own default, which may be a penalty.
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token(tokenizer),
        use_cache=True,
    )


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    decoding: Decoding,
    progress: tqdm,
) -> list[str]:
    """Return the text after the prompt of each question, without special tokens. `model` should be in evaluation mode.

    Args:
        progress: advanced by one for each question.
    """
    config = generation_config(tokenizer, decoding)
    prompts = [encode_prompt(question, tokenizer) for question in questions]
    texts = {}
    for batch in batches([len(prompt) for prompt in prompts], decoding.batch_tokens):
        rows = [prompts[index] for index in batch]
        ids = left_pad(rows, config.pad_token_id).to(model.device)
        mask = attention(rows)["attention_mask"].to(model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        generated = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        texts.update(zip(batch, generated, strict=True))
        progress.update(len(batch))
    return [texts[index] for index in range(len(prompts))]
