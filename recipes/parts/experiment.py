"""A fine-tuning run of a recipe: its data and its base, and how the model is measured and merged."""

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
from smt_trainer import SMTTrainer
from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.model.quantised import quantization_of

logger = logging.getLogger(__name__)


class Experiment:
    """One model on one task: the data, and how the model is loaded, measured and merged.

    Attributes:
        output: folder for everything that is written.
        delta: folder in it for the delta.
        dtype: dtype that the model is loaded in.
        loading: further arguments of `from_pretrained`.
        records: the training records.
        questions: question set -> the questions to evaluate on.
    """

    def __init__(self, recipe: RecipeArguments, decoding: Decoding, training: TrainingArguments) -> None:
        self.recipe, self.decoding = recipe, decoding
        self.output = Path(str(training.output_dir))
        self.delta = self.output / "delta"
        self.task: Task = load_task(recipe.task)
        with training.main_process_first(desc="fetching model and data"):
            self.base = resolve_model(recipe.model)
            splits = self.task.load(recipe.data, recipe.validation_per_set, seed=training.seed)
        self.records = draw(splits.train, recipe.train_records, training.seed)
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

    def load_base(self) -> PreTrainedModel:
        """Load the base, quantised if the recipe says so."""
        return load_model(self.base, self.dtype, self.recipe.trust_remote_code, **self.loading)

    def train_dataset(self) -> Dataset:
        """Return the training records as tokens, with labels on the completions only."""
        return self.records.map(
            tokenize_for_training,
            fn_kwargs={"tokenizer": self.tokenizer, "max_length": self.recipe.max_length},
            remove_columns=self.records.column_names,
        )

    def collator(self) -> CompletionCollator:
        """Return what makes batches of them."""
        return CompletionCollator(pad_token(self.tokenizer))

    def evaluate_untuned(self, trainer: SMTTrainer) -> Evaluation:
        """Measure the model before training, or return what the run being resumed measured."""
        subject = Subject.of(self.task, trainer.model, self.questions, self.decoding)
        earlier = kept(subject, self.output) if trainer.args.resume_from_checkpoint else None
        before = broadcast_object_list([earlier])[0]
        if before is None:
            logger.info("Evaluating %s untuned", self.recipe.model)
            before = self.evaluate(trainer)
            if trainer.is_world_process_zero():
                keep(before, subject, self.output)
        log(before, "untuned")
        return before

    def evaluate_tuned(self, trainer: SMTTrainer) -> Evaluation:
        """Measure the model after training."""
        logger.info("Evaluating the tuned model")
        after = self.evaluate(trainer)
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

    def train_beside(self, trainer: SMTTrainer) -> Beside:
        """Train and measure the PEFT method from the same base, as a finished SMT run was."""
        method = self.recipe.beside
        logger.info("Training %s for comparison", method)
        rate = self.recipe.beside_rate or trainer.args.learning_rate
        rival = train_beside(method, rate, trainer, self.load_base())
        return Beside(method, rate, trained_parameters(rival.model), self.evaluate(rival, generate=False))

    def merge(self, trained: PreTrainedModel) -> Comparison:
        """Write the merged checkpoint and compare it with the trained model on a few questions."""
        merged = self.output / "merged"
        onto = DEQUANTIZED if quantization_of(trained) else None
        loading = self.loading | {"dtype": getattr(torch, self.dtype), "onto": onto}
        loading["trust_remote_code"] = self.recipe.trust_remote_code
        write_merged(self.base, self.delta, merged, self.tokenizer, **loading)
        sample = {name: first(records, self.recipe.check_per_set) for name, records in self.questions.items()}
        loaded = load_model(str(merged), self.dtype, self.recipe.trust_remote_code).to(trained.device)
        return Comparison(onto, *compare(self.task, trained, loaded, self.tokenizer, sample, self.decoding))


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
