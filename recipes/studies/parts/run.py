"""One run: a task, a method and a seed, trained and measured."""

import dataclasses
import functools
import gc
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import mean

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from recipes.math.parts.symbolic import TEMPLATE
from recipes.parts.collator import CompletionCollator
from recipes.parts.methods import trained_parameters
from recipes.parts.model import DEFAULT_MODEL, load_model, resolve_model
from recipes.parts.prompt import pad_token, tokenize_for_training
from recipes.parts.provenance import hardware, versions
from recipes.parts.registry import load_task
from recipes.parts.task import Decoding, Splits
from recipes.studies.parts.general import forgetting
from recipes.studies.parts.methods import COMMON, METHODS
from recipes.studies.parts.products import are_in_hardware, bfloat16_products
from recipes.studies.parts.protocol import PROTOCOLS
from smt_trainer import BlockSelection, SMTConfig, SMTTrainer

LONGEST = 512
"""Most tokens of a training sequence."""
BATCH_TOKENS = 65536 if torch.cuda.is_available() else 2048
"""Most prompt tokens in a batch of questions."""
LEAST_PER_TEMPLATE = 2
"""Least number of test questions of each template."""
FULL_WARM_UP_RATE = 3e-5
"""Learning rate of the steps that train all weights first."""

PACKAGES = ("torch", "transformers", "peft", "smt_trainer")
"""Packages whose versions a result names."""


@dataclass(frozen=True)
class Run:
    """What is trained, how, and on which questions it is measured.

    Attributes:
        task: name of the task.
        method: key of `METHODS`; "none" measures the model untuned.
        budget: trained parameters as a fraction of the model's; None for full fine-tuning.
        rate: peak learning rate; decays linearly to 0.
        seed: seed of everything, the order of the records included.
        split: "validation" measures the loss only, for tuning; "test" measures everything.
        steps: optimizer steps.
        batch: records in a step.
        fields: fields of SMTConfig that differ from the method's, as JSON.
        selected_on: "task:seed" of another run's records, whose warm-up chooses the blocks.
        dtype: dtype that the model is loaded in.
    """

    task: str
    method: str
    budget: float | None
    rate: float
    seed: int
    split: str
    steps: int
    batch: int
    fields: str = "{}"
    selected_on: str | None = None
    dtype: str = "bfloat16"


def perform(run: Run) -> dict:
    """Train and measure. Return a result of JSON types, which names the run, its measures and circumstances."""
    started = time.perf_counter()
    # Trainers are reference cycles: the model of the previous run may still be in memory.
    gc.collect()
    torch.manual_seed(run.seed)
    # TF32 on a GPU, float32 on a processor.
    torch.set_float32_matmul_precision("high")
    model = _load(run)
    result: dict = {"run": asdict(run)}
    with bfloat16_products():
        if run.method != "none":
            with tempfile.TemporaryDirectory() as folder:
                model, facts = _train(model, run, folder)
                result |= facts
        result |= _measure(model, run)
    return {
        **result,
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "bfloat16_products": are_in_hardware(),
        "versions": versions(PACKAGES),
    }


def _train(model: PreTrainedModel, run: Run, folder: str) -> tuple[PreTrainedModel, dict]:
    """Return the trained model and facts about the training. It is not merged, since merging an adapter rounds it."""
    fields = json.loads(run.fields)
    if run.selected_on:
        fields["selection"] = _select(model, run, folder)
    if run.method == "full-warm-up":
        _train_all(model, run, folder)
    trainer = METHODS[run.method].trainer(
        model,
        run.budget,
        run.seed,
        fields,
        args=_arguments(run, folder),
        train_dataset=_records(run.task, run.seed, run.steps * run.batch),
        data_collator=_collator(),
        processing_class=_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "trained_parameters": trained_parameters(trainer.model),
        "training_losses": [round(loss, 4) for loss in losses],
        "training_seconds": round(time.perf_counter() - began, 1),
    }
    if isinstance(trainer, SMTTrainer):
        facts["blocks"] = trainer.smt_selection.blocks_by_projection()
    return trainer.model, facts


def _arguments(run: Run, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=run.batch,
        max_steps=run.steps,
        learning_rate=run.rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=max(1, run.steps // 10),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),
    )


def _train_all(model: PreTrainedModel, run: Run, folder: str) -> None:
    """Train all weights for as many steps as a warm-up, as the authors' code does before it chooses blocks."""
    steps = COMMON["smt_warmup_steps"]
    arguments = dataclasses.replace(_arguments(run, folder), max_steps=steps, learning_rate=FULL_WARM_UP_RATE)
    Trainer(
        model,
        arguments,
        train_dataset=_records(run.task, run.seed, steps * run.batch),
        data_collator=_collator(),
    ).train()


def _select(model: PreTrainedModel, run: Run, folder: str) -> BlockSelection:
    """Return the blocks that a warm-up on another task's or seed's records chooses."""
    task, _, seed = run.selected_on.partition(":")
    steps = COMMON["smt_warmup_steps"]
    trainer = SMTTrainer(
        model,
        _arguments(run, folder),
        train_dataset=_records(task, int(seed), steps * run.batch),
        data_collator=_collator(),
        smt_config=SMTConfig(**COMMON, budget=run.budget),
    )
    return trainer.select()


def _measure(model: PreTrainedModel, run: Run) -> dict:
    """Return the means of all measures, and for a test also the value of each question."""
    task, tokenizer = load_task(run.task), _tokenizer()
    test = run.split == "test"
    decoding = Decoding(generate=False, batch_tokens=BATCH_TOKENS)
    questions = getattr(_splits(run.task), run.split)
    if not test:
        questions = {name: questions[name] for name in PROTOCOLS[run.task].sets or questions}
    values = task.evaluate(model, tokenizer, questions, decoding).values
    result: dict = {}
    if test:
        values = values | {"forgetting": forgetting(model, tokenizer)}
        result["templates"] = {
            name: list(map(int, asked[TEMPLATE])) for name, asked in questions.items() if TEMPLATE in asked.column_names
        }
        result["values"] = {
            measure: {name: [round(value, 3) for value in each] for name, each in sets.items()}
            for measure, sets in values.items()
        }
    result["means"] = {measure: {name: mean(each) for name, each in sets.items()} for measure, sets in values.items()}
    return result


def _load(run: Run) -> PreTrainedModel:
    model = load_model(resolve_model(DEFAULT_MODEL), run.dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))


def _collator() -> CompletionCollator:
    return CompletionCollator(pad_token(_tokenizer()))


@functools.cache
def _splits(task: str) -> Splits:
    protocol = PROTOCOLS[task]
    splits = load_task(task).load(None, protocol.validation, seed=0)
    test = {name: choose_questions(questions, protocol.test) for name, questions in splits.test.items()}
    return dataclasses.replace(splits, test=test)


def choose_questions(questions: Dataset, number: int) -> Dataset:
    """Return the first `number` questions, then more, until there are `LEAST_PER_TEMPLATE` of each template."""
    number = min(number, len(questions))
    chosen = list(range(number))
    if TEMPLATE in questions.column_names:
        templates = questions[TEMPLATE]
        counts = Counter(templates[:number])
        for index in range(number, len(questions)):
            if counts[templates[index]] < LEAST_PER_TEMPLATE:
                counts[templates[index]] += 1
                chosen.append(index)
    return questions.select(chosen)


def _records(task: str, seed: int, number: int) -> Dataset:
    """Return `number` tokenised training records in the order of `seed`; each further epoch has another order."""
    train = _splits(task).train
    order = [
        index
        for epoch in range(-(-number // len(train)))
        for index in torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + 1000 * epoch)).tolist()
    ]
    records = train.select(order[:number])
    return Dataset.from_list([tokenize_for_training(record, _tokenizer(), LONGEST) for record in records])
