"""How far a merged model is from the trained one."""

import pytest
import tiny
import torch

from smt_trainer.merging.logit_difference import (
    PROMPTS,
    RANDOM_TOKENS,
    compare_logits,
    compare_with_merged,
    prompts_for,
)


def test_a_model_does_not_differ_from_itself_and_from_another_as_computed():
    first, second, prompts = tiny.llama().eval(), tiny.llama(seed=1).eval(), [torch.arange(5), torch.arange(7)]
    assert compare_logits(first, first, prompts) == (12, 0, 1, 0)
    logits = [torch.cat([model(ids[None]).logits[0] for ids in prompts]) for model in (first, second)]
    p, q = (each.log_softmax(-1) for each in logits)
    found = compare_logits(first, second, prompts)
    assert found.divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item()
    assert found.largest == (logits[0] - logits[1]).abs().max().item()


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "ViTForImageClassification"])
def test_a_model_that_tokens_alone_do_not_run_is_not_compared(kind, tmp_path):
    model = tiny.build(kind)
    model.save_pretrained(tmp_path)
    assert compare_with_merged(model.eval(), tmp_path) is None


def test_without_a_tokenizer_prompts_are_random_tokens(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    prompts = prompts_for(tmp_path, 64)
    assert [len(ids) for ids in prompts] == [RANDOM_TOKENS] * len(PROMPTS)
    assert all((ids < 64).all() for ids in prompts)
