"""The prompt of the SMT paper, with the same tokens in training and evaluation.

A sequence is `BOS, prompt, output, EOS`, without BOS if the tokenizer itself adds none, as those of Qwen and SmolLM2.
Prompt and output are tokenised separately and joined as ids, so that an evaluation starts from exactly
the ids that the training loss was conditioned on.
"""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from recipes.parts.collator import IGNORED_LABEL

TEMPLATE = (
    "Below is an instruction that describes a task. "
    # Two spaces end this line in the reference implementation. A model tuned with them needs them.
    "Write a response that appropriately completes the request.  \n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n"
)
RESERVED_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")


def prompt_text(record: Mapping[str, str]) -> str:
    """Return the prompt of `record`. As in the reference, a non-empty `input` replaces the instruction."""
    return TEMPLATE.format(instruction=record["input"] or record["instruction"])


def encode_prompt(
    record: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[int]:
    """Return the token ids of the prompt, after one BOS if the tokenizer itself adds it.

    A prompt of more than `max_length` tokens loses its first tokens after the BOS. This keeps the answer choices and
    the response marker, which come last.
    """
    bos = added_bos(tokenizer)
    ids = tokenizer(prompt_text(record), add_special_tokens=False).input_ids
    surplus = 0 if max_length is None else max(0, len(bos) + len(ids) - max_length)
    return bos + ids[surplus:]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that `tokenizer` adds before a text: `[BOS]` or `[]`."""
    bos = [tokenizer.bos_token_id]
    return bos if tokenizer("a").input_ids[:1] == bos else []


def tokenize_for_training(
    record: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of at most `max_length` tokens. The labels hide the prompt from the loss.

    Raises:
        ValueError: the output and its EOS leave no room for a prompt token. An answer is never cut.
    """
    output = [*tokenizer(record["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    room = max_length - len(output)
    if room < 1:
        raise ValueError(
            f"The output {record['output'][:80]!r} takes {len(output)} tokens with its EOS; expected fewer than "
            f"max_length={max_length}. Raise max_length or drop the record."
        )
    prompt = encode_prompt(record, tokenizer, room)
    return {"input_ids": prompt + output, "labels": [IGNORED_LABEL] * len(prompt) + output}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad id of `tokenizer`. Set its pad token if it has none.

    Use a reserved token of the vocabulary if there is one (as in Llama 3), else EOS. The masks and labels of this
    recipe come from lengths and not from comparing ids with the pad id, so real EOS tokens stay visible.

    Raises:
        ValueError: the tokenizer has neither a pad token nor an EOS token.
    """
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in RESERVED_PAD_TOKENS if t in vocabulary), tokenizer.eos_token)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "Expected a tokenizer with a pad or an EOS token, got one with neither. "
            "Set tokenizer.eos_token to the token that ends an answer."
        )
    return tokenizer.pad_token_id
