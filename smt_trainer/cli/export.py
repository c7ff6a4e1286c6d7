"""`smt export BASE DELTA OUT --format lora`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import (
    DTYPES,
    add_base_and_delta,
    add_command,
    add_json,
    add_onto,
    add_out,
    count,
    leave_out_threads,
)
from smt_trainer.cli.output import OUTPUT, write

KEYS = {"output": OUTPUT}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(commands, "export", run, "write what a delta changes as a LoRA adapter, exactly")
    add_base_and_delta(parser)
    add_out(parser)
    parser.add_argument("--format", choices=("lora",), required=True, help="lora: an adapter in PEFT's format")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the adapter; the 16-bit ones round the change"
    )
    parser.add_argument(
        "--max-rank", type=count, default=512, help="largest rank to allow (default: 512, vLLM's largest)"
    )
    add_onto(parser, "as in smt merge")
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Write the adapter, and log its ranks, size and rounding; see `export_lora`."""
    leave_out_threads()

    from smt_trainer.export.lora import export_lora

    export_lora(
        arguments.base,
        arguments.delta,
        arguments.out,
        base_revision=arguments.revision,
        delta_revision=arguments.delta_revision,
        dtype=arguments.dtype,
        max_rank=arguments.max_rank,
        onto=arguments.onto,
    )
    write(arguments, {"output": arguments.out}, [f"LoRA adapter in {arguments.out}"])
