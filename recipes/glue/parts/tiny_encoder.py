"""A tiny BERT trained on eight categories of instructions: a base for learning others. Trained once, in seconds."""

import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from recipes.glue.parts.categories import KNOWN, read_categories
from recipes.parts.model import made_once
from recipes.parts.tiny_training import train_steps

logger = logging.getLogger(__name__)

TINY_BERT = "tiny-bert"
OF_EACH, WORDS, LONGEST = 400, 2000, 32
STEPS, BATCH, RATE, SEED = 300, 32, 1e-3, 1234
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]")


def resolve_tiny() -> str:
    """Return the folder of the tiny encoder without its head, with its tokenizer; train both on first use."""
    return made_once(f"{TINY_BERT}-{STEPS}-{SEED}", _train)


def build(words: int, labels: int) -> BertForSequenceClassification:
    """Build the encoder with random weights: two layers of width 64."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    config = BertConfig(vocab_size=words, max_position_embeddings=LONGEST, num_labels=labels, pad_token_id=0, **sizes)
    return BertForSequenceClassification(config)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most `WORDS` tokens (byte-level BPE), learned from texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    pad, cls, sep = SPECIAL_TOKENS
    ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    backend.post_processor = processors.TemplateProcessing(f"{cls} $A {sep}", f"{cls} $A {sep} $B {sep}", ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, cls_token=cls, sep_token=sep, model_max_length=LONGEST
    )


def _train(folder: Path) -> None:
    logger.info("Training %s on eight categories of instructions (once, %d steps)", TINY_BERT, STEPS)
    texts = read_categories(KNOWN, OF_EACH)
    tokenizer = make_tokenizer(texts["text"])
    labels = torch.tensor(texts["label"])
    inputs = tokenizer(list(texts["text"]), truncation=True, padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(len(tokenizer), len(KNOWN))
        columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        loss = train_steps(model, columns, BATCH, STEPS, RATE)
    logger.info("%s: loss %.3f at the last step", TINY_BERT, loss)
    model.base_model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
