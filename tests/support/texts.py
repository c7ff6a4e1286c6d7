"""A tokenizer that needs no file."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS, begins: bool = True) -> PreTrainedTokenizerFast:
    """Make a lossless tokenizer with one token for each byte.

    Args:
        special_tokens: `SPECIAL_TOKENS` in the order of their ids.
        begins: whether BOS is put before a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*special_tokens, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    if begins:
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
