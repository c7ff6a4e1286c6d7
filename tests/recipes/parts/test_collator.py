import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from recipes.parts.collator import CompletionCollator
from recipes.parts.prompt import pad_token, tokenize_for_training

RECORDS = [
    {"instruction": f"Say {answer}{'!' * number}", "input": "", "output": answer}
    for number, answer in enumerate(("a", "bcd", "efghij"))
]


@pytest.fixture
def features(tokenizer):
    return [tokenize_for_training(record, tokenizer, max_length=1000) for record in RECORDS]


def test_rows_are_padded_on_the_left_by_length():
    collate = CompletionCollator(pad_token_id=9)
    batch = collate([{"input_ids": [1, 9, 2], "labels": [-100, 9, 2]}, {"input_ids": [4, 9], "labels": [-100, 9]}])
    assert batch["input_ids"].tolist() == [[1, 9, 2], [9, 4, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 9, 2], [-100, -100, 9]]
    assert batch["logits_to_keep"] == 3


def test_labels_are_those_of_the_longest_answer_and_of_the_token_before_it(features):
    batch = CompletionCollator(0)(features)
    longest = len("efghij") + 1  # plus EOS
    assert batch["labels"].shape == (3, longest + 1) and batch["logits_to_keep"] == longest + 1
    for labels, feature in zip(batch["labels"], features, strict=True):
        assert labels[labels != -100].tolist() == [label for label in feature["labels"] if label != -100]
        assert labels[0] == -100


def test_loss_and_gradients_equal_those_of_plain_right_padding(model, features):
    def gradients(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()]

    plain = {
        key: pad_sequence([torch.tensor(feature[key]) for feature in features], True, value)
        for key, value in {"input_ids": 2, "labels": -100}.items()
    }
    plain["attention_mask"] = pad_sequence([torch.ones(len(feature["labels"])) for feature in features], True)
    # The model is float64, but transformers computes the loss in float32.
    torch.testing.assert_close(gradients(CompletionCollator(2)(features)), gradients(plain), rtol=1e-5, atol=1e-7)


def test_an_eos_that_also_pads_stays_visible(tokenizer, features):
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id
    batch = CompletionCollator(pad_token(tokenizer))(features)
    assert (batch["labels"][:, -1] == tokenizer.eos_token_id).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(feature["input_ids"]) for feature in features]
