import pytest
import torch

from recipes.studies.parts import general


def surprise(model, tokenizer, context: str, completion: str) -> float:
    """Nats of a completion after a context, one sequence at a time."""
    before = tokenizer(context, add_special_tokens=False).input_ids
    ids = torch.tensor([before + tokenizer(completion, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)[0, :-1]
    each = logits.gather(1, ids[0, 1:, None])[:, 0]
    return -each[max(0, len(before) - 1) :].sum().item()


def test_the_loss_of_a_passage_is_that_of_all_its_tokens_but_the_first(model, tokenizer):
    passages = ["A short one.", "A somewhat longer passage, so that the first is padded."]
    found = general.passage_losses(model.eval(), tokenizer, passages)
    # The tokenizer has one token for each character.
    wanted = [surprise(model, tokenizer, "", passage) / (len(passage) - 1) for passage in passages]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_choice_with_the_largest_log_probability_per_character_is_the_answer(model, tokenizer):
    choices = ["a", "a much longer choice", "short", "of middling length"]
    query = "Question: which one?\nAnswer:"
    per_character = [surprise(model.eval(), tokenizer, query, f" {choice}") / len(f" {choice}") for choice in choices]
    likeliest = per_character.index(min(per_character))
    questions = [{"query": query, "choices": choices, "gold": gold} for gold in range(4)]
    assert general.choice_accuracies(model, tokenizer, questions) == [float(gold == likeliest) for gold in range(4)]
