"""The task of the SMT paper's main experiment: eight sets of questions with answers to choose from."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.parts.answering import answer_questions
from recipes.commonsense.parts.data import load_splits
from recipes.commonsense.parts.metric import ChoiceAccuracy
from recipes.commonsense.parts.question_sets import QUESTION_SETS
from recipes.parts.evaluation import Evaluation
from recipes.parts.inference import evaluating
from recipes.parts.task import Decoding, Splits

GENERATED = "accuracy"
LIKELIEST = "accuracy by likelihood"


class Commonsense:
    """LLM-Adapters' commonsense questions; a `recipes.parts.task.Task`."""

    def __init__(self) -> None:
        self.name = "commonsense"
        self.measures = {
            GENERATED: "share of questions whose generated text names the right label first",
            LIKELIEST: "share of questions whose likeliest label, of those offered, is the right one",
        }

    def load(self, source: str | None, validation: int, seed: int) -> Splits:
        """Return the splits of the eight sets; see `load_splits`."""
        return load_splits(source, validation, seed)

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, Dataset],
        decoding: Decoding,
    ) -> Evaluation:
        """Measure `model` on the questions of each set; without generation, by likelihood only."""
        measures = self.measures if decoding.generate else [LIKELIEST]
        result = Evaluation({measure: {} for measure in measures}, {}, {measure: {} for measure in measures})
        with evaluating(model, sum(map(len, questions.values()))) as progress:
            for name, asked in questions.items():
                labels, metric = QUESTION_SETS[name].answers, ChoiceAccuracy(name)
                answers = answer_questions(model, tokenizer, labels, asked, decoding, progress)
                predictions = {LIKELIEST: [answer.choice for answer in answers]}
                if decoding.generate:
                    predictions[GENERATED] = result.texts[name] = [answer.text for answer in answers]
                for measure, predicted in predictions.items():
                    correct = metric.correct(predicted, asked["answer"])
                    result.values[measure][name] = list(map(float, correct))
                    result.answers[measure][name] = list(map(metric.extract, predicted))
        return result


COMMONSENSE = Commonsense()
