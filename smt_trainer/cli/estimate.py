"""`smt estimate MODEL`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from smt_trainer.cli.options import (
    DTYPES,
    add_command,
    add_config_flags,
    add_json,
    add_model,
    add_step_flags,
    amount,
    count,
    given_fields,
)
from smt_trainer.cli.output import BLOCKS, blocks, fact, table, write
from smt_trainer.config import SMTConfig

if TYPE_CHECKING:
    from smt_trainer.estimation.estimate import Estimate

FIELDS = [*SMTConfig.deciding("targets", "scores", "choice", "training", "run"), "accumulator_dtype"]
KEYS = {
    "selection": BLOCKS,
    "smt": "cost of a step on each device, bytes and FLOPs",
    "warmup": "the same for the warm-up, or null",
    "lora": "the same for LoRA",
    "full": "the same for full fine-tuning",
    "lora_rank": "rank at which LoRA trains as much",
    "accumulators": "score -> bytes of its warm-up sums",
    "write_back": "bytes read and written after each step",
    "delta": "bytes on disk",
    "peak": "bytes that warm-up or training needs on each device",
    "fits": "whether that is at most --card",
}
STEPS = ("smt", "warmup", "lora", "full")
ROWS = {
    "weights": "weights",
    "added": "added",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "logits and loss": "loss",
    "peak": "peak",
}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands, "estimate", run, "estimate what training a model takes, from its configuration alone"
    )
    add_model(parser, "a folder with a config.json")
    add_step_flags(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the base of SMT and LoRA: NF4 or LLM.int8")
    parser.add_argument("--ranks", type=count, default=1, help="number of devices")
    parser.add_argument("--zero", type=int, choices=range(4), default=0, help="stage of ZeRO; 3 also for FSDP2")
    parser.add_argument("--card", type=amount, default=24.0, help="memory of a device in GiB")
    add_config_flags(parser, FIELDS)
    add_json(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Print what the run takes, along with LoRA and full fine-tuning; `estimation/` explains each line."""
    import torch

    from smt_trainer.estimation.estimate import estimate

    found = estimate(
        arguments.model,
        SMTConfig(**given_fields(arguments, FIELDS)),
        batch=arguments.batch,
        seq=arguments.seq,
        dtype=getattr(torch, arguments.dtype),
        bits=arguments.bits,
        checkpointing=arguments.checkpointing,
        ranks=arguments.ranks,
        zero_stage=arguments.zero,
    )
    spare = round(arguments.card * 2**30) - found.peak
    result = {
        "selection": blocks(found.selection),
        **{name: cost and asdict(cost) for name in STEPS for cost in [getattr(found, name)]},
        **{name: getattr(found, name) for name in ("lora_rank", "accumulators", "write_back", "delta", "peak")},
        "fits": spare >= 0,
    }
    write(arguments, result, _lines(found, arguments.card, spare))


def _lines(found: Estimate, card: float, spare: int) -> Iterator[str]:
    yield fact("blocks", found.selection.summary().partition(";")[0])
    yield fact("write-back", f"{_amount(found.write_back)} read and written after each step")
    yield fact("delta", f"{_amount(found.delta)} on disk")
    yield fact("warm-up sums", ", ".join(f"{score} {_amount(size)}" for score, size in found.accumulators.items()))
    yield ""
    columns = {"SMT": found.smt, "warm-up": found.warmup, f"LoRA r={found.lora_rank}": found.lora, "full": found.full}
    costs = {title: cost for title, cost in columns.items() if cost is not None}
    rows = {title: [_amount(getattr(cost, name)) for cost in costs.values()] for title, name in ROWS.items()}
    rows["TFLOPs a step"] = [f"{cost.flops / 1e12:.4g}" for cost in costs.values()]
    yield from table(["each device", *costs], rows)
    yield ""
    verdict = f"yes, {_amount(spare)} to spare" if spare >= 0 else f"no, {_amount(-spare)} too much"
    yield f"fits a {card:g} GiB card: {verdict}"


def _amount(size: float) -> str:
    """Format bytes for people to read."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.{2 if unit else 0}f} {UNITS[unit]}"
