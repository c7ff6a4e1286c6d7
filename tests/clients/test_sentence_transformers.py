"""sentence-transformers on an encoder that SMT trained."""

import numpy as np
import tiny
import torch
from sentence_transformers import SentenceTransformer
from texts import byte_tokenizer

from smt_trainer import convert_to_smt, from_delta, merge_checkpoint, save_delta

TEXTS = ["a red stone", "two blue stones, painted", "go home"]


def test_an_encoder_trained_in_it_is_merged_and_gives_the_same_embeddings(tmp_path):
    base, delta, merged = (tmp_path / name for name in ("base", "delta", "merged"))
    tokenizer = byte_tokenizer()
    tiny.build("BertModel", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    untrained = SentenceTransformer(str(base), device="cpu").encode(TEXTS)

    sentences = SentenceTransformer(str(base), device="cpu")
    encoder = sentences[0].auto_model
    convert_to_smt(encoder, tiny.choose(encoder))
    optimizer = torch.optim.AdamW([each for each in sentences.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(5):
        first, second, third = sentences(sentences.preprocess(TEXTS))["sentence_embedding"]
        (torch.cosine_similarity(first, third, 0) - torch.cosine_similarity(first, second, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sentences.encode(TEXTS)
    save_delta(encoder, delta)
    merge_checkpoint(base, delta, merged)

    np.testing.assert_array_equal(SentenceTransformer(str(merged), device="cpu").encode(TEXTS), trained)
    again = SentenceTransformer(str(base), device="cpu")
    again[0].auto_model.load_state_dict(from_delta(delta, base=str(base)).state_dict())
    np.testing.assert_array_equal(again.encode(TEXTS), trained)
    assert np.abs(trained - untrained).max() > 1e-3
