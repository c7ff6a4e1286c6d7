import pytest
import torch
from torch import nn
from transformers import Cohere2Config, Cohere2ForCausalLM, Gemma2Config, Gemma2ForCausalLM

from recipes.parts.answer_scores import last_scores
from smt_trainer import BlockScores, SMTConfig, convert_to_smt

IDS = torch.arange(3, 33).reshape(5, 6)
TOKENS = list(range(40, 160))
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def float32_products(model):
    """The product of head and hidden state in float32, [rows, tokens]."""
    head = model.get_output_embeddings()
    hidden = model.model(input_ids=IDS).last_hidden_state[:, -1].float()
    products = hidden @ head.weight.float().T
    return (products if head.bias is None else products + head.bias.float())[:, TOKENS]


def ties(scores):
    return scores.numel() - sum(len(row.unique()) for row in scores)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_logits_that_tie_in_bfloat16_are_told_apart_as_the_head_says_in_float32(model, bias):
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=bias)
    model = model.eval().bfloat16()
    assert ties(model(IDS).logits[:, -1, TOKENS]) > 0
    scores = last_scores(model, TOKENS, input_ids=IDS)
    assert scores.dtype == torch.float32 and ties(scores) == 0
    torch.testing.assert_close(scores, float32_products(model), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_head_that_trains_blocks_gives_the_scores_of_the_same_plain_head(model):
    model = model.eval().bfloat16()
    plain = last_scores(model, TOKENS, input_ids=IDS)
    config = SMTConfig(target_modules=["lm_head"], score="random", budget=4, block_size=(7, 16))
    convert_to_smt(model, BlockScores.of(model, config, []).select())
    assert torch.equal(last_scores(model, TOKENS, input_ids=IDS), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
    ],
    ids=["soft cap", "scale"],
)
def test_a_cap_or_scale_after_the_head_keeps_the_order(model):
    torch.manual_seed(0)
    model = model().eval().bfloat16()
    scores, logits = last_scores(model, TOKENS, input_ids=IDS), model(IDS).logits[:, -1, TOKENS]
    assert ties(scores) == 0 < ties(logits)
    assert (logits.gather(1, scores.argsort()).float().diff() >= -(2**-7) * logits.abs().max()).all()
    torch.testing.assert_close(scores, float32_products(model), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_autocast_does_not_round_the_scores(model):
    model = model.eval().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ties(last_scores(model, TOKENS, input_ids=IDS)) == 0


class Negated(nn.Linear):
    """A head of another class."""

    def forward(self, input):
        return -super().forward(input)


@torch.no_grad()
@pytest.mark.parametrize("head", ["another class", "reordered afterwards"])
def test_otherwise_the_models_own_logits_decide(model, head):
    model = model.eval()
    if head == "another class":
        model.lm_head = Negated(32, model.config.vocab_size, dtype=torch.float64)
    else:
        model.register_forward_hook(lambda _, inputs, output: setattr(output, "logits", -output.logits))
    expected = model(IDS).logits[:, -1, TOKENS]
    assert torch.equal(last_scores(model, TOKENS, input_ids=IDS), expected.float())


@torch.no_grad()
def test_no_hook_is_left_behind(model):
    last_scores(model.eval(), TOKENS, input_ids=IDS)
    assert not model.lm_head._forward_hooks
