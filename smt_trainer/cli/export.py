"""`smt export BASE DELTA OUT --format lora`."""

from __future__ import annotations

import argparse
import logging
import os

from smt_trainer.cli.options import add_base_and_delta, add_onto, count


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser("export", help="write what a delta changes as a LoRA adapter, exactly")
    add_base_and_delta(parser, "out", "folder to write; must be new or empty")
    parser.add_argument("--format", choices=("lora",), required=True, help="lora: an adapter in PEFT's format")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the adapter; the 16-bit ones round the change",
    )
    parser.add_argument(
        "--max-rank", type=count, default=512, help="largest rank to allow (default: 512, vLLM's largest)"
    )
    add_onto(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the adapter, with a line on its ranks, size and rounding; see `export_lora`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("smt_trainer").setLevel(logging.INFO)
    # As for merging, numpy's BLAS has nothing to do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from smt_trainer.delta.lora import export_lora

    export_lora(
        arguments.base,
        arguments.delta,
        arguments.out,
        revision=arguments.revision,
        dtype=arguments.dtype,
        max_rank=arguments.max_rank,
        onto=arguments.onto,
    )
    print(f"LoRA adapter in {arguments.out}")
