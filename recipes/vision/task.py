"""Image classification (SPSFT, tables 2 and 4)."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, DefaultDataCollator

from recipes.parts.classification import LABELS, Examples
from recipes.parts.measures_of_labels import Measure, accuracy, cross_entropy, worst_class
from recipes.vision.parts.data import load_images
from recipes.vision.parts.tiny_models import TINY_RESNET, TINY_VIT, resolve_tiny


class Vision:
    """Labelled images; a `recipes.parts.classification.Classification`."""

    def __init__(self) -> None:
        self.name = "vision"
        self.model_class = AutoModelForImageClassification
        self.default_model = TINY_VIT

    def load(self, source: str | None, label_column: str | None) -> Examples:
        """Return labelled images; see `load_images`."""
        return load_images(source, label_column)

    def resolve(self, model: str) -> str:
        """Return the folder of a tiny model, which is trained on first use; return any other name unchanged."""
        return resolve_tiny(model) if model in (TINY_VIT, TINY_RESNET) else model

    def processor(self, base: str) -> Any:
        """Return the image processor of a base, or None if it has none."""
        try:
            return AutoImageProcessor.from_pretrained(base)
        except OSError:
            return None

    def prepared(self, examples: Dataset, processor: Any, max_length: int) -> Dataset:
        """Return `pixel_values` and `labels`; images are read and processed on access."""
        if "pixel_values" in examples.column_names:
            return examples

        def process(batch: Mapping[str, list]) -> dict:
            images = [image.convert("RGB") for image in batch["image"]]
            return {**processor(images, return_tensors="pt"), LABELS: batch[LABELS]}

        return examples.with_transform(process)

    def collator(self, processor: Any) -> Callable:
        """Return transformers' default collator."""
        return DefaultDataCollator()

    def measures(self, source: str | None, classes: list[str]) -> Mapping[str, Measure]:
        """Return the accuracy, on all images and on those of the worst class, and the loss."""
        return {"accuracy": accuracy, "worst class": worst_class, "loss": cross_entropy}


VISION = Vision()
