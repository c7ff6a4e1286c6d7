"""`smt select MODEL --data FILE --output FOLDER` and `smt select --scores FILE --output FOLDER`."""

from __future__ import annotations

import argparse
import functools
import inspect
from dataclasses import replace
from pathlib import Path

from smt_trainer.cli.options import (
    DTYPES,
    add_command,
    add_config_flags,
    add_json,
    add_model,
    add_step_flags,
    count,
    given_fields,
    seed,
)
from smt_trainer.cli.output import BLOCKS, OUTPUT, blocks, write
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError, first_line

FIELDS = [*SMTConfig.deciding("targets", "scores", "warm-up", "choice"), "accumulator_device"]
# Flags that say how model and data are read, besides those of the configuration.
READING = ("batch", "seq", "checkpointing", "accumulation", "dtype", "seed")
WARMUP_FIELDS = {*SMTConfig.deciding("warm-up"), "accumulator_device"}
KEYS = {"output": OUTPUT, "selection": BLOCKS}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(commands, "select", run, "choose the blocks of a model from data, or from saved scores")
    add_model(parser, "a folder", nargs="?")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON list or JSON lines; each record has a text, a prompt and a completion, or messages",
    )
    parser.add_argument("--scores", type=Path, metavar="FILE", help="choose from these scores, without model and data")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", required=True, help="folder for the selection and the scores"
    )
    add_step_flags(parser)
    parser.add_argument("--accumulation", type=count, default=16, help="batches per warm-up step")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the weights; auto: as saved"
    )
    parser.add_argument("--seed", type=seed, default=42, help="seed for the order of the data")
    add_config_flags(parser, FIELDS)
    add_json(parser, KEYS)
    parser.set_defaults(usual={name: parser.get_default(name) for name in READING})


def run(arguments: argparse.Namespace) -> None:
    """Choose the blocks, write the selection, and print its summary."""
    if arguments.scores is not None and (arguments.model or arguments.data):
        raise SMTError("give a model and --data, or --scores alone; scores already come from a model and data.")
    if arguments.scores is None and not (arguments.model and arguments.data):
        raise SMTError("give a model and --data to choose the blocks from, or the --scores of an earlier run.")
    given = given_fields(arguments, FIELDS)
    vain = {
        *(given.keys() & WARMUP_FIELDS),
        *(name for name in READING if getattr(arguments, name) != arguments.usual[name]),
    }
    if arguments.scores is not None and vain:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(vain))
        raise SMTError(f"{flags} would change the warm-up, but the scores come from a finished one. Leave it out.")
    selection = _choose_again(arguments, given) if arguments.scores else _choose(arguments, SMTConfig(**given))
    result = {"output": str(arguments.output), "selection": blocks(selection)}
    write(arguments, result, [selection.summary(), f"selection in {arguments.output}"])


def _choose_again(arguments: argparse.Namespace, given: dict):
    """Choose from a scores file, with its own configuration apart from the fields given."""
    from smt_trainer.selection.block_scores import BlockScores
    from smt_trainer.selection.block_selection import SELECTION_FILE

    scores = BlockScores.load(arguments.scores)
    selection = scores.select(replace(scores.config, **given))
    selection.save(arguments.output / SELECTION_FILE)
    return selection


def _choose(arguments: argparse.Namespace, config: SMTConfig):
    """Choose by a warm-up on the data."""
    from smt_trainer.cli.examples import load_records, make_examples, pad

    records = load_records(arguments.data)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from smt_trainer.model.activation_checkpointing import checkpoint_activations
    from smt_trainer.training.trainer import SMTTrainer

    examples = make_examples(records, _load(AutoTokenizer, arguments.model), arguments.seq)
    model = _load(AutoModelForCausalLM, arguments.model, dtype=arguments.dtype)
    if arguments.checkpointing:
        checkpoint_activations(model)
    training = TrainingArguments(
        str(arguments.output),
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        seed=arguments.seed,
        report_to=[],
        save_strategy="no",
    )
    # On an H200, cuDNN's attention made every gradient NaN where padding on the left is masked.
    torch.backends.cuda.enable_cudnn_sdp(False)
    collate = functools.partial(pad, takes=inspect.signature(model.forward).parameters)
    try:
        return SMTTrainer(model, training, collate, examples, smt_config=config).select()
    except torch.OutOfMemoryError as error:
        raise SMTError(f"{first_line(error)} Give a smaller --batch or --seq, or --checkpointing.") from error


def _load(auto_class, name: str, **kwargs):
    """Load a folder or hub name with transformers. Raise `SMTError` with the first line of its error."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except Exception as error:  # an odd file makes transformers raise anything
        raise SMTError(f"no causal language model with a tokenizer at {name}: {first_line(error)}") from error
