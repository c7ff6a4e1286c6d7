"""The math task: worked solutions of word problems, measured by their final answers and by their loss."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.math.parts.files import file_splits
from recipes.math.parts.metric import SolutionAccuracy
from recipes.math.parts.symbolic import NEW_NUMBERS, NEW_TEMPLATES, symbolic_splits
from recipes.parts.completion_loss import completion_fits
from recipes.parts.evaluation import Evaluation
from recipes.parts.generation import generate_texts
from recipes.parts.inference import evaluating
from recipes.parts.task import Decoding, Splits

ACCURACY, TOKENS, LOSS = "accuracy", "accuracy by token", "loss"


class Math:
    """GSM-Symbolic, or LLM-Adapters' math files; a `recipes.parts.task.Task`.

    The loss says little on LLM-Adapters' test sets: a language model wrote their outputs, which are often wrong.
    """

    def __init__(self) -> None:
        self.name = "math"
        self.measures = {
            ACCURACY: "share of questions whose generated solution ends in the right answer",
            TOKENS: "share of the worked solution's tokens that are the likeliest after the right ones before them",
            LOSS: "nats per token of the worked solution",
        }

    def load(self, source: str | None, validation: int, seed: int) -> Splits:
        """Return the splits of GSM-Symbolic if `source` is None, else of LLM-Adapters' files."""
        return symbolic_splits(validation, seed) if source is None else file_splits(source, validation, seed)

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, Dataset],
        decoding: Decoding,
    ) -> Evaluation:
        """Measure `model` on the questions of each set; without generation, on the worked solutions only."""
        values: dict[str, dict[str, list[float]]] = {ACCURACY: {}} if decoding.generate else {}
        values |= {TOKENS: {}, LOSS: {}}
        texts = {}
        passes = 1 + decoding.generate
        with evaluating(model, passes * sum(map(len, questions.values()))) as progress:
            for name, asked in questions.items():
                fits = completion_fits(model, tokenizer, asked, decoding.batch_tokens, progress)
                values[LOSS][name], values[TOKENS][name] = map(list, zip(*fits, strict=True))
                if decoding.generate:
                    texts[name] = generate_texts(model, tokenizer, asked, decoding, progress)
                    correct = metric_of(name).correct(texts[name], asked["answer"])
                    values[ACCURACY][name] = list(map(float, correct))
        return Evaluation(values, texts)


def metric_of(question_set: str) -> SolutionAccuracy:
    """Return the metric of a question set: strict for GSM-Symbolic, whose solutions mark their answer with "####"."""
    return SolutionAccuracy("strict" if question_set in (NEW_NUMBERS, NEW_TEMPLATES) else "flexible")


MATH = Math()
