import pytest
import torch
from datasets import Dataset
from tqdm import tqdm

from recipes.parts.generation import generate_texts
from recipes.parts.prompt import encode_prompt
from recipes.parts.task import Decoding

QUESTIONS = Dataset.from_list([{"instruction": "why " * (n % 4) + f"{n}?", "input": ""} for n in range(7)])


def texts(model, tokenizer, **decoding):
    with tqdm(total=len(QUESTIONS), disable=True) as progress:
        return generate_texts(model.eval(), tokenizer, QUESTIONS, Decoding(max_new_tokens=8, **decoding), progress)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_texts_equal_those_one_by_one(model, tokenizer, num_beams):
    batched = texts(model, tokenizer, num_beams=num_beams)
    assert batched == texts(model, tokenizer, num_beams=num_beams, batch_tokens=1)
    assert len(set(batched)) > 1


@torch.no_grad()
def test_a_greedy_text_takes_the_likeliest_token_each_time(model, tokenizer):
    expected = []
    for question in QUESTIONS:
        ids = prompt = encode_prompt(question, tokenizer)
        while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()]
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert texts(model, tokenizer) == expected


def test_defaults_of_the_model_do_not_change_the_decoding(model, tokenizer):
    plain = texts(model, tokenizer)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, num_beams=4)
    assert texts(model, tokenizer) == plain
