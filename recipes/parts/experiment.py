"""A fine-tuning run of a recipe: data, model and trainer, and how the model is measured and merged."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from recipes.parts.arguments import RecipeArguments
from recipes.parts.baseline import Beside, train_beside
from recipes.parts.cached_evaluation import Subject, keep, kept
from recipes.parts.collator import CompletionCollator
from recipes.parts.constant_answers import constant_answers
from recipes.parts.dtype import fastest_dtype
from recipes.parts.evaluation import Evaluation
from recipes.parts.measures import table
from recipes.parts.merged import Comparison, compare, write_merged
from recipes.parts.methods import trained_parameters
from recipes.parts.model import load_model, resolve_model
from recipes.parts.prompt import pad_token, tokenize_for_training
from recipes.parts.quantisation import quantised_loading
from recipes.parts.registry import load_task
from recipes.parts.task import Decoding, Task
from smt_trainer import SMTConfig, SMTTrainer
from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.model.quantised import quantization_of

logger = logging.getLogger(__name__)


class Experiment:
    """One model on one task: the data, the trainer, and how the model is loaded, measured and merged.

    Attributes:
        output: folder for everything that is written.
        dtype: dtype that the model is loaded in.
        loading: further arguments of `from_pretrained`.
        quantization: how the base is quantised; None if it is not.
        merged_onto: the `onto` of `from_delta` when merging; None unless the base is quantised.
        questions: question set -> the questions to evaluate on.
        trainer: trains the model.
        timer: records the seconds of its steps.
    """

    def __init__(
        self, recipe: RecipeArguments, decoding: Decoding, smt_config: SMTConfig, training: TrainingArguments
    ) -> None:
        self.recipe, self.decoding = recipe, decoding
        self.output = Path(str(training.output_dir))
        self.task: Task = load_task(recipe.task)
        with training.main_process_first(desc="fetching model and data"):
            self.base = resolve_model(recipe.model)
            splits = self.task.load(recipe.data, recipe.validation_per_set, seed=training.seed)
        self.questions = {
            name: draw(records, recipe.questions_per_set, training.seed)
            for name, records in getattr(splits, recipe.evaluate_on).items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, trust_remote_code=recipe.trust_remote_code)
        config = AutoConfig.from_pretrained(self.base, trust_remote_code=recipe.trust_remote_code)
        self.dtype = recipe.dtype
        if recipe.dtype == "auto":
            self.dtype = broadcast_object_list([fastest_dtype(config)])[0]
        self.loading = quantised_loading(recipe.bits, config, self.dtype, training.device)
        model = self._load()
        self.quantization = quantization_of(model)
        self.merged_onto = DEQUANTIZED if self.quantization else None
        self.timer = StepTimer()
        records = draw(splits.train, recipe.train_records, training.seed)
        self.trainer = SMTTrainer(
            model=model,
            args=training,
            train_dataset=records.map(
                tokenize_for_training,
                fn_kwargs={"tokenizer": self.tokenizer, "max_length": recipe.max_length},
                remove_columns=records.column_names,
            ),
            data_collator=CompletionCollator(pad_token(self.tokenizer)),
            processing_class=self.tokenizer,
            callbacks=[self.timer],
            smt_config=smt_config,
        )

    def evaluate_untuned(self) -> Evaluation:
        """Measure the model before training, or return what the run being resumed measured."""
        subject = Subject.of(self.task, self.trainer.model, self.questions, self.decoding)
        earlier = kept(subject, self.output) if self.trainer.args.resume_from_checkpoint else None
        before = broadcast_object_list([earlier])[0]
        if before is None:
            logger.info("Evaluating %s untuned", self.recipe.model)
            before = self.evaluate(self.trainer)
            if self.trainer.is_world_process_zero():
                keep(before, subject, self.output)
        log(before, "untuned")
        return before

    def evaluate_tuned(self) -> Evaluation:
        """Measure the model after training."""
        logger.info("Evaluating the tuned model")
        after = self.evaluate(self.trainer)
        log(after, "tuned")
        return after

    def evaluate(self, trainer: Trainer, generate: bool = True) -> Evaluation:
        """Let each rank answer its share of the questions, and return the whole result on all ranks.

        Args:
            trainer: trainer whose model is measured.
            generate: False generates no answers, whatever the recipe says.
        """
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        share = {name: records.shard(ranks, rank) for name, records in self.questions.items()}
        decoding = replace(self.decoding, generate=self.decoding.generate and generate)
        parts = gather_object([self.task.evaluate(trainer.model, self.tokenizer, share, decoding)])
        return Evaluation.joined(parts)

    def train_beside(self) -> Beside:
        """Train and measure the PEFT method from the same base."""
        method = self.recipe.beside
        logger.info("Training %s for comparison", method)
        rate = self.recipe.beside_rate or self.trainer.args.learning_rate
        rival = train_beside(method, rate, self.trainer, self._load())
        return Beside(method, rate, trained_parameters(rival.model), self.evaluate(rival, generate=False))

    def merge(self) -> Comparison:
        """Write the merged checkpoint and compare it with the trained model on a few questions."""
        merged = self.output / "merged"
        loading = self.loading | {"dtype": getattr(torch, self.dtype), "onto": self.merged_onto}
        loading["trust_remote_code"] = self.recipe.trust_remote_code
        write_merged(self.base, self.output / "delta", merged, self.tokenizer, **loading)
        sample = {name: first(records, self.recipe.check_per_set) for name, records in self.questions.items()}
        trained = self.trainer.model
        loaded = load_model(str(merged), self.dtype, self.recipe.trust_remote_code).to(trained.device)
        return compare(self.task, trained, loaded, self.tokenizer, sample, self.decoding)

    def _load(self) -> PreTrainedModel:
        return load_model(self.base, self.dtype, self.recipe.trust_remote_code, **self.loading)


class StepTimer(TrainerCallback):
    """Record the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def draw(records: Dataset, number: int | None, seed: int) -> Dataset:
    """Return `number` random records, or all in random order if None."""
    return first(records.shuffle(seed=seed), len(records) if number is None else number)


def first(records: Dataset, number: int) -> Dataset:
    """Return the first `number` records, or all if there are fewer."""
    return records.select(range(min(number, len(records))))


def log(evaluation: Evaluation, label: str) -> None:
    """Log the means of an evaluation, and where the model gives one answer to all questions."""
    logger.info("\n%s\n", table({label: evaluation}))
    for line in constant_answers({label: evaluation}):
        logger.warning("Warning: %s.", line)
