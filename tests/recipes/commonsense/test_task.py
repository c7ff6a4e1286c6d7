import pytest
import torch
from datasets import Dataset

from recipes.commonsense.parts.answering import distinguishing_tokens
from recipes.commonsense.parts.templates import OUTPUT, labels
from recipes.commonsense.task import COMMONSENSE
from recipes.parts.evaluation import Evaluation
from recipes.parts.prompt import encode_prompt
from recipes.parts.task import Decoding


def questions(count, stem="solution", offered=(2,)):
    """Questions of uneven length whose numbers of answers cycle through `offered`."""
    formats = ["/".join(labels(stem, offered[n % len(offered)])) for n in range(count)]
    return Dataset.from_list(
        [
            {
                "instruction": f"{'why ' * (n % 4)}{n}? Answer format: {answers}",
                "input": "",
                "answer": f"{stem}{1 + n % 2}",
            }
            for n, answers in enumerate(formats)
        ]
    )


def evaluate(model, tokenizer, test, **settings):
    decoding = Decoding(**{"max_new_tokens": 8, "batch_tokens": 2000} | settings)
    return COMMONSENSE.evaluate(model, tokenizer, test, decoding)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_answers_equal_those_one_by_one(model, tokenizer, num_beams):
    test = {"piqa": questions(9)}
    batched = evaluate(model, tokenizer, test, num_beams=num_beams)
    assert batched == evaluate(model, tokenizer, test, num_beams=num_beams, batch_tokens=1)
    assert len(set(batched.texts["piqa"])) > 1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_that_from_the_bare_prompt(model, tokenizer, num_beams):
    test = {"piqa": questions(5)}
    model.eval()
    expected = []
    for question in test["piqa"]:
        ids = torch.tensor([encode_prompt(question, tokenizer)])
        output = model.generate(ids, attention_mask=ids >= 0, max_new_tokens=8, num_beams=num_beams, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert evaluate(model, tokenizer, test, num_beams=num_beams).texts["piqa"] == expected


def log_likelihood(model, prompt, output):
    """Return the log-probability of the tokens of `output` after `prompt`."""
    logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(output)), output].sum().item()


@torch.no_grad()
def test_the_likelihood_choice_is_that_of_the_whole_outputs(model, tokenizer):
    test = {"ARC-Easy": questions(12, "answer", offered=(3, 4, 5))}
    model.eval()
    expected = []
    for question in test["ARC-Easy"]:
        prompt = encode_prompt(question, tokenizer)
        offered = question["instruction"].rpartition(" ")[2].split("/")
        outputs = {a: tokenizer(OUTPUT.format(answer=a), add_special_tokens=False).input_ids for a in offered}
        best = max(offered, key=lambda a, p=prompt, o=outputs: log_likelihood(model, p, o[a]))
        expected.append(best == question["answer"])
    assert evaluate(model, tokenizer, test).values["accuracy by likelihood"]["ARC-Easy"] == expected
    assert 0 < sum(expected) < len(expected)


def test_a_model_that_always_ends_at_once_is_wrong_everywhere(model, tokenizer):
    model.lm_head = torch.nn.Linear(32, len(tokenizer), dtype=torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(tokenizer.eos_token_id), len(tokenizer)).double()
    result = evaluate(model, tokenizer, {"piqa": questions(3)})
    assert result.texts["piqa"] == ["", "", ""]
    assert result.average("accuracy") == 0


def test_without_generation_only_the_likelihood_is_measured_and_alike(model, tokenizer):
    test = {"piqa": questions(5)}
    whole, part = (evaluate(model, tokenizer, test, generate=generate) for generate in (True, False))
    assert list(whole.values) == list(COMMONSENSE.measures)
    likelihood = "accuracy by likelihood"
    assert (part.values, part.texts) == ({likelihood: whole.values[likelihood]}, {})


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, tokenizer, training):
    model.train(training)
    use_cache = model.config.use_cache
    evaluate(model, tokenizer, {"piqa": questions(2)})
    assert (model.training, model.config.use_cache) == (training, use_cache)


def test_answers_that_one_token_cannot_tell_apart_are_refused(tokenizer):
    with pytest.raises(ValueError, match="Expected one token to tell the answers answer1, answer10 apart"):
        distinguishing_tokens(("answer1", "answer10"), tokenizer)
    with pytest.raises(ValueError, match="Expected one token to tell the answers ab, ac, b apart"):
        distinguishing_tokens(("ab", "ac", "b"), tokenizer)


def test_evaluations_of_consecutive_shares_join(model, tokenizer):
    test = questions(5)
    shares = [evaluate(model, tokenizer, {"piqa": test.shard(2, rank)}) for rank in range(2)]
    assert Evaluation.joined(shares) == evaluate(model, tokenizer, {"piqa": test})
