import pytest
import torch
from datasets import Dataset
from tqdm import tqdm

from recipes.parts import completion_loss
from recipes.parts.completion_loss import completion_fits
from recipes.parts.prompt import encode_prompt

OUTPUTS = ["x", "2 + 3 = 5\n#### 5", "naïve", "", "A longer output than any other of these, by far."]


@pytest.fixture
def records():
    return Dataset.from_list(
        [
            {"instruction": "why " * (n % 3) + "?", "input": "", "output": output, "answer": ""}
            for n, output in enumerate(OUTPUTS)
        ]
    )


def fits(model, tokenizer, records, batch_tokens=2000):
    with tqdm(total=len(records), disable=True) as progress:
        return completion_fits(model.eval(), tokenizer, records, batch_tokens, progress)


def losses(*arguments):
    return [fit.loss for fit in fits(*arguments)]


@torch.no_grad()
def slow(model, tokenizer, record):
    """Return loss and accuracy of one completion, token by token from the logits of its own prefix, in float64."""
    prompt = encode_prompt(record, tokenizer)
    output = [*tokenizer(record["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    total, likeliest = 0.0, 0
    for position, token in enumerate(output):
        logits = model(torch.tensor([prompt + output[:position]])).logits[0, -1]
        total -= logits.log_softmax(0)[token].item()
        likeliest += logits.argmax().item() == token
    return total / len(output), likeliest / len(output)


def test_loss_and_accuracy_are_means_over_output_and_eos(model, tokenizer, records):
    # So that some tokens are predicted right.
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, dtype=model.dtype)
    head.bias.data[tokenizer(OUTPUTS[1], add_special_tokens=False).input_ids] += 0.1
    model.lm_head = head
    expected = [slow(model.eval(), tokenizer, record) for record in records]
    found = fits(model, tokenizer, records)
    assert [fit.loss for fit in found] == pytest.approx([loss for loss, _ in expected], rel=1e-6)
    assert [fit.accuracy for fit in found] == pytest.approx([accuracy for _, accuracy in expected])
    assert len({fit.loss for fit in found}) == len(found)
    assert 0 < sum(fit.accuracy for fit in found) < len(found)


@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_padding_and_batches_do_not_change_a_loss(model, tokenizer, records, batch_tokens):
    whole = losses(model, tokenizer, records)
    assert losses(model, tokenizer, records, batch_tokens) == pytest.approx(whole, rel=1e-6)


def test_no_batch_holds_more_logits_than_allowed(model, tokenizer, records, monkeypatch):
    longest, seen = 250, []
    monkeypatch.setattr(completion_loss, "MOST_LOGITS", longest * len(tokenizer))
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.numel()))
    losses(model, tokenizer, records)
    assert len(seen) > 1
    assert max(seen) <= longest * len(tokenizer)


def test_the_softmax_is_in_float32(model, tokenizer, records):
    exact = losses(model, tokenizer, records)
    rounded = losses(model.to(torch.bfloat16), tokenizer, records)
    assert rounded == pytest.approx(exact, rel=0.1)
    # A loss in bfloat16 would be a multiple of 2^-7 or coarser.
    assert all(loss * 2**7 % 1 for loss in rounded)
