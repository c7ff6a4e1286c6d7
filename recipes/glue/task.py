"""Classification of texts or pairs of texts, and regression, as in GLUE (SPSFT, tables 3 and 5)."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from recipes.glue.parts.data import load_texts, text_columns
from recipes.glue.parts.tiny_encoder import TINY_BERT, resolve_tiny
from recipes.parts.classification import LABELS, Examples
from recipes.parts.measures_of_labels import (
    Measure,
    accuracy,
    cross_entropy,
    f1,
    matthews,
    pearson,
    spearman,
    squared_error,
)

PAIR, CORRELATIONS = {"accuracy": accuracy, "F1": f1}, {"Pearson": pearson, "Spearman": spearman}
MEASURES = {"cola": {"Matthews": matthews}, "mrpc": PAIR, "qqp": PAIR}
"""GLUE task -> its measures, if they are not the accuracy."""


class Glue:
    """Labelled texts; a `recipes.parts.classification.Classification`."""

    def __init__(self) -> None:
        self.name = "glue"
        self.model_class = AutoModelForSequenceClassification
        self.default_model = TINY_BERT

    def load(self, source: str | None, label_column: str | None) -> Examples:
        """Return labelled texts; see `load_texts`."""
        return load_texts(source, label_column)

    def resolve(self, model: str) -> str:
        """Return the folder of the tiny encoder, which is trained on first use; return any other name unchanged."""
        return resolve_tiny() if model == TINY_BERT else model

    def processor(self, base: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a base."""
        return AutoTokenizer.from_pretrained(base)

    def prepared(self, examples: Dataset, processor: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Return the token ids of each text or pair, at most `max_length`, with `labels`."""
        texts = text_columns(examples)

        def tokenize(columns: Mapping[str, list]) -> dict:
            return dict(processor(*(columns[name] for name in texts), truncation=True, max_length=max_length))

        others = [name for name in examples.column_names if name != LABELS]
        return examples.map(tokenize, batched=True, remove_columns=others)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Return a collator that pads a batch to its longest text."""
        return DataCollatorWithPadding(processor)

    def measures(self, source: str | None, classes: list[str]) -> Mapping[str, Measure]:
        """Return the GLUE task's measures, else the accuracy, or correlations for a regression; and always the loss."""
        if not classes:
            return CORRELATIONS | {"squared error": squared_error}
        return MEASURES.get(source or "", {"accuracy": accuracy}) | {"loss": cross_entropy}


GLUE = Glue()
