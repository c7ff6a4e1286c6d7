"""Fine-tune a classifier in several ways from one base, and compare them.

For each method: load the base with a new head, train, measure on held-out examples. What SMT and SPSFT train is saved
as a delta and merged, and the merged checkpoint is compared with the trained model. `python -m recipes.classify
--profile recipes/glue/default.args` runs the short profile of the text task. Any field of `ClassifyArguments`,
`SMTConfig` and `TrainingArguments` can follow as a flag.
"""

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from recipes.parts.classification import SEED, Classification, Examples
from recipes.parts.classify_arguments import ClassifyArguments, parse_classify_arguments
from recipes.parts.classify_methods import METHODS
from recipes.parts.classify_report import Outcome, Report, write_report
from recipes.parts.methods import Adapter, Sparse, trained_parameters
from recipes.parts.new_modules import new_modules
from recipes.parts.registry import load_classification
from smt_trainer import SMTConfig, SMTTrainer, from_delta, merge_and_unload, plot_selection

logger = logging.getLogger("recipes.classify")


class Comparison:
    """One base, one set of examples and one seed, for all methods."""

    def __init__(self, recipe: ClassifyArguments, smt_config: SMTConfig, training: TrainingArguments) -> None:
        self.recipe, self.smt_config, self.training = recipe, smt_config, training
        self.task: Classification = load_classification(recipe.task)
        self.output = Path(str(training.output_dir))
        with training.main_process_first(desc="fetching model and data"):
            self.base = self.task.resolve(recipe.model or self.task.default_model)
            examples = self.task.load(recipe.data, recipe.label_column)
        self.examples = drawn(examples, recipe, training.seed)
        self.processor = self.task.processor(self.base)
        self.train, self.test = (
            self.task.prepared(each, self.processor, recipe.max_length)
            for each in (self.examples.train, self.examples.held_out)
        )
        self.labels = np.array(self.examples.held_out["labels"])
        self.measures = self.task.measures(recipe.data, self.examples.classes)

    def perform(self, method: str) -> Outcome:
        """Train and measure one method."""
        set_seed(self.training.seed)
        rate = self.recipe.rate_of.get(method, self.training.learning_rate)
        model = self.load()
        how = METHODS[method]
        if isinstance(how, Adapter):
            how = replace(how, target_modules=self.smt_config.target_modules)
        fields = self._fields(how, model) if isinstance(how, Sparse) else {}
        trainer = how.trainer(
            model,
            self.smt_config.budget,
            self.training.seed,
            fields,
            args=replace(self.training, learning_rate=rate, output_dir=str(self.output / method)),
            train_dataset=self.train,
            data_collator=self.task.collator(self.processor),
        )
        _quiet(trainer)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        outputs = predict(trainer, self.test)
        trained = trained_parameters(trainer.model)
        saved = self._save(trainer, method, outputs) if isinstance(trainer, SMTTrainer) else {}
        values = {name: measure(outputs, self.labels) for name, measure in self.measures.items()}
        logger.info("%s: %s", how.label, ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
        return Outcome(method, how.label, trained, rate, seconds, trainer.state.global_step, values, outputs, **saved)

    def load(self) -> PreTrainedModel:
        """Load the base with a head for the classes, in float32."""
        classes = self.examples.classes
        names = {"id2label": dict(enumerate(classes)), "label2id": {name: place for place, name in enumerate(classes)}}
        return self.task.model_class.from_pretrained(
            self.base, dtype="float32", ignore_mismatched_sizes=True, **names if classes else {"num_labels": 1}
        )

    def _fields(self, how: Sparse, model: PreTrainedModel) -> dict[str, Any]:
        """Return the command line's SMTConfig fields without the budget, overridden by those that define the method."""
        new = new_modules(model)
        whole = {"modules_to_save": new, "exclude_modules": new} if new else {}
        given = self.smt_config.to_dict() | how.fields | whole
        return {name: value for name, value in given.items() if name != "budget"}

    def _save(self, trainer: SMTTrainer, method: str, outputs: np.ndarray) -> dict[str, Any]:
        """Write delta, merged checkpoint and picture, and compare the merged checkpoint with the trained model."""
        folder = self.output / method
        trainer.save_model(str(folder / "delta"))
        from_delta(folder / "delta", base=self.base, ignore_mismatched_sizes=True).save_pretrained(folder / "merged")
        if self.processor is not None:
            self.processor.save_pretrained(folder / "merged")
        plot_selection(trainer.smt_selection, folder / "selection.png")
        merged = self.task.model_class.from_pretrained(folder / "merged")
        reader = Trainer(merged, trainer.args, trainer.data_collator)
        _quiet(reader)
        selection = trainer.smt_selection.summary()
        moved = np.abs(predict(reader, self.test) - outputs).max()
        # The trained model is not needed any more, so it is merged in place.
        trained, stored = merge_and_unload(trainer.model).state_dict(), merged.state_dict()
        return {
            "selection": selection,
            "delta_bytes": sum(file.stat().st_size for file in (folder / "delta").iterdir()),
            "merged_equal": trained.keys() == stored.keys()
            and all(torch.equal(tensor.cpu(), stored[name].cpu()) for name, tensor in trained.items()),
            "merged_moved": float(moved),
        }


def main() -> None:
    started = time.perf_counter()
    recipe, smt_config, training = parse_classify_arguments()
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    disable_progress_bars()
    # Otherwise each load of the base shows a progress bar and a table saying that its head is new.
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    comparison = Comparison(recipe, smt_config, training)
    methods = list(recipe.methods)
    if not comparison.examples.classes and "qm_taylor" in methods:
        logger.warning("qm_taylor ranks by class and is left out: the labels are those of a regression.")
        methods.remove("qm_taylor")
    outcomes = [comparison.perform(method) for method in methods]
    report = Report(
        task=comparison.task.name,
        model=recipe.model or comparison.task.default_model,
        data=comparison.examples.source,
        evaluated_on=recipe.evaluate_on,
        classes=comparison.examples.classes,
        train_examples=len(comparison.train),
        labels=comparison.labels,
        measures=comparison.measures,
        outcomes=outcomes,
        seed=training.seed,
        total_seconds=time.perf_counter() - started,
        processor_seconds=time.process_time(),
    )
    write_report(report, comparison.output)


def drawn(examples: Examples, recipe: ClassifyArguments, seed: int) -> Examples:
    """Return as many random examples as asked for. The validation split does not depend on the seed."""
    train, held_out = examples.train, examples.held_out
    if recipe.evaluate_on == "validation":
        parts = train.train_test_split(0.2, seed=SEED)
        train, held_out = parts["train"], parts["test"]
    return replace(
        examples,
        train=sampled(train, recipe.train_records, seed),
        held_out=sampled(held_out, recipe.test_records, seed),
    )


def sampled(examples: Dataset, number: int | None, seed: int) -> Dataset:
    """Return `number` random examples, or all if it is None."""
    return examples if number is None else examples.shuffle(seed=seed).select(range(min(number, len(examples))))


def predict(trainer: Trainer, examples: Dataset) -> np.ndarray:
    """Return the outputs [examples, classes] of a trainer's model."""
    outputs = trainer.predict(examples).predictions
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _quiet(trainer: Trainer) -> None:
    """Remove the progress bar and the log lines of each step, since there is a run for each method."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


if __name__ == "__main__":
    sys.exit(main())
