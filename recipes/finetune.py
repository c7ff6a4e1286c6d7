"""Fine-tune a language model on a task with Sparse Matrix Tuning, and measure it before and after.

An ordinary Trainer script: evaluate, train with `SMTTrainer`, evaluate, save the delta, merge it, check the merged
checkpoint, report. `python -m recipes.finetune --profile recipes/commonsense/default.args` runs the short profile of
the commonsense task. Any field of `RecipeArguments`, `Decoding`, `SMTConfig` and `TrainingArguments` can follow as a
flag. `accelerate launch -m` and `torchrun -m` also run it.
"""

import logging
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback

from recipes.parts.arguments import parse_arguments, resumed_from
from recipes.parts.beside import Beside, train_beside
from recipes.parts.collator import CompletionCollator
from recipes.parts.constant import constant_answers
from recipes.parts.dtype import fastest_dtype
from recipes.parts.evaluation import Evaluation
from recipes.parts.measures import table
from recipes.parts.merged import compare, write_merged
from recipes.parts.methods import trained_parameters
from recipes.parts.model import load_model, resolve_model
from recipes.parts.prompt import pad_token, tokenize_for_training
from recipes.parts.quantisation import quantised_loading
from recipes.parts.registry import load_task
from recipes.parts.report import Run, write_report
from recipes.parts.reporting import peak_memory_bytes
from recipes.parts.task import Decoding, Task
from recipes.parts.untuned import Subject, keep, kept
from smt_trainer import SMTTrainer, plot_selection
from smt_trainer.delta.onto import DEQUANTIZED, in_words
from smt_trainer.model.quantised import quantization_of

logger = logging.getLogger("recipes.finetune")


class StepTimer(TrainerCallback):
    """Record the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    started = time.perf_counter()
    recipe, decoding, smt_config, training = parse_arguments()
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # It logs a line for each product in 8 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bars()
    output = Path(training.output_dir)

    task = load_task(recipe.task)
    with training.main_process_first(desc="fetching model and data"):
        base = resolve_model(recipe.model)
        splits = task.load(recipe.data, recipe.validation_per_set, seed=training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=recipe.trust_remote_code)
    config = AutoConfig.from_pretrained(base, trust_remote_code=recipe.trust_remote_code)
    if recipe.dtype == "auto":
        recipe = replace(recipe, dtype=broadcast_object_list([fastest_dtype(config)])[0])
    loading = quantised_loading(recipe.bits, config, recipe.dtype, training.device)
    model = load_model(base, recipe.dtype, recipe.trust_remote_code, **loading)
    quantization = quantization_of(model)
    questions = {
        name: draw(records, recipe.questions_per_set, training.seed)
        for name, records in getattr(splits, recipe.evaluate_on).items()
    }
    records = draw(splits.train, recipe.train_records, training.seed)
    timer = StepTimer()
    trainer = SMTTrainer(
        model=model,
        args=training,
        train_dataset=records.map(
            tokenize_for_training,
            fn_kwargs={"tokenizer": tokenizer, "max_length": recipe.max_length},
            remove_columns=records.column_names,
        ),
        data_collator=CompletionCollator(pad_token(tokenizer)),
        processing_class=tokenizer,
        callbacks=[timer],
        smt_config=smt_config,
    )

    checkpoint = resumed_from(training)
    subject = Subject.of(task, trainer.model, questions, decoding)
    earlier = kept(subject, output) if training.resume_from_checkpoint else None
    before = broadcast_object_list([earlier])[0]
    if before is None:
        logger.info("Evaluating %s untuned", recipe.model)
        before = evaluate_on_all_ranks(task, trainer, questions, decoding)
        if trainer.is_world_process_zero():
            keep(before, subject, output)
    log(before, "untuned")
    trainer.train(resume_from_checkpoint=checkpoint)
    peak_memory = peak_memory_bytes()
    trainer.save_model(str(output / "delta"))
    logger.info("Evaluating the tuned model")
    after = evaluate_on_all_ranks(task, trainer, questions, decoding)
    log(after, "tuned")
    beside = None
    if recipe.beside:
        logger.info("Training %s beside it", recipe.beside)
        rate = recipe.beside_rate or training.learning_rate
        other = load_model(base, recipe.dtype, recipe.trust_remote_code, **loading)
        rival = train_beside(recipe.beside, rate, trainer, other)
        result = evaluate_on_all_ranks(task, rival, questions, replace(decoding, generate=False))
        beside = Beside(recipe.beside, rate, trained_parameters(rival.model), result)

    if trainer.is_world_process_zero():
        plot_selection(trainer.smt_selection, output / "selection.png")
        loading |= {"dtype": getattr(torch, recipe.dtype), "trust_remote_code": recipe.trust_remote_code}
        loading |= {"onto": DEQUANTIZED if quantization else None}
        write_merged(base, output / "delta", output / "merged", tokenizer, **loading)
        merged = load_model(str(output / "merged"), recipe.dtype, recipe.trust_remote_code).to(trainer.model.device)
        sample = {name: first(records, recipe.check_per_set) for name, records in questions.items()}
        run = Run(
            task=task,
            model=recipe.model,
            dtype=recipe.dtype,
            quantization=in_words(quantization) if quantization else None,
            evaluated_on=recipe.evaluate_on,
            before=before,
            after=after,
            merged_onto=loading["onto"],
            merged=compare(task, trainer.model, merged, tokenizer, sample, decoding),
            beside=beside,
            selection=trainer.smt_selection,
            steps=trainer.state.global_step,
            seconds_per_step=statistics.median(timer.seconds) if timer.seconds else None,
            peak_memory_bytes=peak_memory,
            delta_folder=output / "delta",
            seed=training.seed,
            total_seconds=time.perf_counter() - started,
        )
        write_report(run, output)
    trainer.accelerator.wait_for_everyone()


def draw(records: Dataset, number: int | None, seed: int) -> Dataset:
    """Return `number` random records, or all in random order if None."""
    return first(records.shuffle(seed=seed), len(records) if number is None else number)


def first(records: Dataset, number: int) -> Dataset:
    """Return the first `number` records, or all if there are fewer."""
    return records.select(range(min(number, len(records))))


def evaluate_on_all_ranks(
    task: Task, trainer: Trainer, questions: dict[str, Dataset], decoding: Decoding
) -> Evaluation:
    """Let each rank answer its share of the questions, and return the whole result on all ranks."""
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = {name: records.shard(ranks, rank) for name, records in questions.items()}
    parts = gather_object([task.evaluate(trainer.model, trainer.processing_class, share, decoding)])
    return Evaluation.joined(parts)


def log(evaluation: Evaluation, label: str) -> None:
    """Log the means of an evaluation, and where the model gives one answer to all questions."""
    logger.info("\n%s\n", table({label: evaluation}))
    for line in constant_answers({label: evaluation}):
        logger.warning("Warning: %s.", line)


if __name__ == "__main__":
    sys.exit(main())
