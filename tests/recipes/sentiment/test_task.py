import pytest
import torch
from datasets import Dataset

from recipes.parts.answer_scores import last_scores
from recipes.parts.prompt import encode_prompt
from recipes.parts.source import Source
from recipes.parts.task import Decoding
from recipes.sentiment.task import GENERATED, LIKELIEST, LOSS, REVIEWS, SENTIMENT, WORDS


@pytest.fixture
def sst2(monkeypatch):
    found = [{"sentence": f"review {number} ", "label": number % 2} for number in range(400)]
    monkeypatch.setattr(Source, "_documents", lambda source: found)


@pytest.fixture
def questions():
    texts = ["good", "a much longer sentence than that", "bad", "dull", "fine"]
    records = [
        {"instruction": text, "input": "", "output": WORDS[number % 2], "answer": WORDS[number % 2]}
        for number, text in enumerate(texts)
    ]
    return {REVIEWS: Dataset.from_list(records)}


def test_the_test_records_are_the_same_for_every_seed(sst2):
    first, other = (SENTIMENT.load(None, validation=20, seed=seed) for seed in (0, 1))
    parts = [set(each["instruction"]) for each in (first.train, first.validation[REVIEWS], first.test[REVIEWS])]
    assert [len(part) for part in parts] == [80, 20, 300]
    assert len(set.union(*parts)) == 400
    assert first.test[REVIEWS]["instruction"] == other.test[REVIEWS]["instruction"]
    assert first.validation[REVIEWS]["instruction"] != other.validation[REVIEWS]["instruction"]


def test_a_record_asks_for_the_word_of_its_label(sst2):
    for record in SENTIMENT.load(None, 0, 0).train:
        number = int(record["instruction"].split()[-1])
        assert record["output"] == record["answer"] == WORDS[number % 2]
        assert record["instruction"].endswith(f"\n\nreview {number}")


def test_own_data_are_refused():
    with pytest.raises(ValueError, match=r"no data for the task 'sentiment', got mine\.json\. See make glue"):
        SENTIMENT.load("mine.json", 0, 0)


@pytest.mark.parametrize("batch_tokens", [1, 2**14])
def test_loss_and_likeliest_word_are_those_of_each_prompt_alone(batch_tokens, model, tokenizer, questions):
    asked = questions[REVIEWS]
    result = SENTIMENT.evaluate(model, tokenizer, questions, Decoding(generate=False, batch_tokens=batch_tokens))
    assert list(result.values) == [LIKELIEST, LOSS] and result.texts == {}
    tokens = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS]
    model.eval()
    for place, question in enumerate(asked):
        with torch.no_grad():
            scores = last_scores(model, tokens, input_ids=torch.tensor([encode_prompt(question, tokenizer)]))[0]
        right = WORDS.index(question["answer"])
        assert result.values[LOSS][REVIEWS][place] == pytest.approx(-scores.log_softmax(0)[right].item(), abs=1e-5)
        assert result.values[LIKELIEST][REVIEWS][place] == float(scores.argmax() == right)


def test_a_generated_text_counts_if_it_is_the_right_word(model, tokenizer, questions, monkeypatch):
    said = ["negative", " positive\n", "positive", "it is positive", ""]
    monkeypatch.setattr("recipes.sentiment.task.generate_texts", lambda *_: said)
    result = SENTIMENT.evaluate(model, tokenizer, questions, Decoding())
    assert list(result.values) == list(SENTIMENT.measures)
    assert result.values[GENERATED] == {REVIEWS: [1, 1, 0, 0, 0]}
    assert result.texts == {REVIEWS: said}
