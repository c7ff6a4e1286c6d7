import pytest
from tokenizers import processors

from recipes.parts.prompt import (
    encode_prompt,
    pad_token,
    prompt_text,
    tokenize_for_training,
)

RECORD = {"instruction": "Is it so? Answer format: true/false", "input": "", "output": "the answer is true"}
OUTPUT_TOKENS = len(RECORD["output"]) + 1  # one for each byte, plus EOS


def seen_by_loss(features):
    return [label for label in features["labels"] if label != -100]


def test_prompt_text_is_that_of_the_reference_implementation():
    assert prompt_text(RECORD) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n\n"
        "### Instruction:\nIs it so? Answer format: true/false\n\n### Response:\n"
    )


def test_a_non_empty_input_replaces_the_instruction():
    other = {"instruction": "Other {braces}", "input": ""}
    assert prompt_text(RECORD | {"input": other["instruction"]}) == prompt_text(other)


def test_the_evaluation_prompt_is_a_prefix_of_the_training_ids(tokenizer):
    prompt = encode_prompt(RECORD, tokenizer)
    features = tokenize_for_training(RECORD, tokenizer, max_length=1000)
    assert features["input_ids"][: len(prompt)] == prompt
    assert features["labels"][: len(prompt)] == [-100] * len(prompt)


def test_the_loss_sees_the_output_and_its_eos(tokenizer):
    features = tokenize_for_training(RECORD, tokenizer, max_length=1000)
    assert tokenizer.decode(seen_by_loss(features)) == RECORD["output"] + tokenizer.eos_token


def test_bos_comes_once_and_only_where_the_tokenizer_itself_adds_it(tokenizer):
    ids = encode_prompt(RECORD, tokenizer)
    assert ids == tokenizer(prompt_text(RECORD)).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # as Qwen's
    assert tokenizer.bos_token_id is not None
    assert encode_prompt(RECORD, tokenizer) == ids[1:]
    tokenizer.bos_token = None
    assert encode_prompt(RECORD, tokenizer) == ids[1:]


@pytest.mark.parametrize("max_length", [OUTPUT_TOKENS + 2, 40, 100])
def test_truncation_keeps_bos_answer_and_the_end_of_the_prompt(tokenizer, max_length):
    whole = tokenize_for_training(RECORD, tokenizer, max_length=1000)
    cut = tokenize_for_training(RECORD, tokenizer, max_length)
    assert len(cut["input_ids"]) == len(cut["labels"]) == max_length
    assert cut["input_ids"] == [tokenizer.bos_token_id, *whole["input_ids"][1 - max_length :]]
    assert seen_by_loss(cut) == seen_by_loss(whole)


def test_an_output_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"{OUTPUT_TOKENS} tokens .* fewer than max_length={OUTPUT_TOKENS}"):
        tokenize_for_training(RECORD, tokenizer, max_length=OUTPUT_TOKENS)


def test_a_pad_token_is_kept_and_a_reserved_one_preferred_to_eos(tokenizer):
    assert pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<pad>")
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    size = len(tokenizer)
    assert pad_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert len(tokenizer) == size


def test_a_tokenizer_without_pad_and_eos_is_refused(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Expected a tokenizer with a pad or an EOS token"):
        pad_token(tokenizer)
