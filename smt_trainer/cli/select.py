"""`smt select MODEL --data FILE --output FOLDER` and `smt select --scores FILE --output FOLDER`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from smt_trainer.cli.options import add_config_flags, given_fields
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError

DTYPES = ("auto", "float32", "bfloat16", "float16")
FIELDS = [*SMTConfig.deciding("targets", "scores", "warm-up", "choice"), "accumulator_device"]


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser("select", help="choose the blocks of a model from data, or again from kept scores")
    parser.add_argument("model", nargs="?", help="causal language model: a folder, or a name on the hub")
    parser.add_argument(
        "--data", type=Path, help="JSON list or JSON lines; records have a text, or a prompt and a completion"
    )
    parser.add_argument("--scores", type=Path, help="choose from these scores, without model and data")
    parser.add_argument("--output", type=Path, required=True, help="folder for selection and scores")
    parser.add_argument("--batch", type=int, default=1, help="sequences that go through the model at a time")
    parser.add_argument("--accumulation", type=int, default=16, help="such batches in each warm-up step")
    parser.add_argument("--seq", type=int, default=512, help="tokens of the longest sequence; longer ones are cut")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; by default the checkpoint's")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of each layer")
    parser.add_argument("--seed", type=int, default=42, help="of the data's order")
    add_config_flags(parser, FIELDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Choose the blocks, write what was chosen, and say how much it is."""
    if arguments.scores is not None and (arguments.model or arguments.data):
        raise SMTError("give a model and --data, or --scores alone: the scores are of a model and data already.")
    if arguments.scores is None and not (arguments.model and arguments.data):
        raise SMTError("give a model and --data to choose the blocks from, or the --scores of a former run.")
    given = given_fields(arguments, FIELDS)
    selection = _choose_again(arguments, given) if arguments.scores else _choose(arguments, SMTConfig(**given))
    print(f"{selection.summary()}\nselection in {arguments.output}")


def _choose_again(arguments: argparse.Namespace, given: dict):
    """The selection from a scores file, by its own configuration but for what was given."""
    from smt_trainer.selection.block_scores import BlockScores
    from smt_trainer.selection.block_selection import SELECTION_FILE

    scores = BlockScores.load(arguments.scores)
    selection = scores.select(replace(scores.config, **given))
    selection.save(arguments.output / SELECTION_FILE)
    return selection


def _choose(arguments: argparse.Namespace, config: SMTConfig):
    """The selection from a warm-up on the data."""
    from smt_trainer.cli.examples import load_records, make_examples, pad

    records = load_records(arguments.data)

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from smt_trainer.training.trainer import SMTTrainer

    examples = make_examples(records, _load(AutoTokenizer, arguments.model), arguments.seq)
    model = _load(AutoModelForCausalLM, arguments.model, dtype=arguments.dtype)
    if arguments.checkpointing:
        # Early versions 5 of transformers know the second name only, later ones warn of it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()
    training = TrainingArguments(
        str(arguments.output),
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        seed=arguments.seed,
        report_to=[],
        save_strategy="no",
    )
    return SMTTrainer(model, training, pad, examples, smt_config=config).select()


def _load(auto_class, name: str, **kwargs):
    """What transformers loads by a name. Raises `SMTError` with the first line of its complaint."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise SMTError(f"no causal language model with its tokenizer at {name}: {first_line}") from error
