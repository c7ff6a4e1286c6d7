"""What the clients load: a tiny model trained on questions, in each form that it can be written."""

from types import SimpleNamespace

import pytest
import tiny
import transformers
from texts import byte_tokenizer

from recipes.commonsense.parts.templates import social_i_qa
from recipes.parts.collator import CompletionCollator
from recipes.parts.prompt import tokenize_for_training
from smt_trainer import SMTTrainer, export_lora

WORDS = "red blue green black white brown pink grey".split()


def make_questions() -> list[dict[str, str]]:
    """Make questions with three answers each, in the form of the commonsense recipe."""
    documents = [
        {
            "context": f"Alex found {number} {word} stones.",
            "question": "What will Alex do next?",
            "answerA": f"count {number} stones",
            "answerB": f"paint them {word}",
            "answerC": "go home",
            "gold": number % 3,
        }
        for number, word in enumerate(WORDS * 3)
    ]
    return [social_i_qa(document) for document in documents]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Train with SMT; return the questions, the tokenizer, the trained model, and the folders of base, delta, merged
    checkpoint and LoRA adapter."""
    folder, tokenizer, questions = tmp_path_factory.mktemp("run"), byte_tokenizer(), make_questions()
    base, delta, merged, lora = (folder / name for name in ("base", "delta", "merged", "lora"))
    tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = tiny.smt_trainer(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        folder / "run",
        tiny.config(target_modules="all-linear", budget=64),
        kind=SMTTrainer,
        data=[tokenize_for_training(question, tokenizer, 1024) for question in questions],
        collator=CompletionCollator(tokenizer.pad_token_id),
        max_steps=12,
        remove_unused_columns=False,
    )
    trainer.processing_class = tokenizer
    trainer.train()
    trainer.save_model(str(delta))
    trainer.merge_and_save(merged)
    export_lora(base, delta, lora)
    return SimpleNamespace(
        questions=questions, tokenizer=tokenizer, model=trainer.model.eval(), base=base, merged=merged, lora=lora
    )
