"""`smt estimate MODEL`."""

from __future__ import annotations

import argparse

from smt_trainer.cli.options import add_config_flags, amount, count, given_fields
from smt_trainer.config import SMTConfig

DTYPES = ("float32", "bfloat16", "float16")
FIELDS = [*SMTConfig.deciding("targets", "scores", "choice", "training", "run"), "accumulator_dtype"]
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
    parser = commands.add_parser("estimate", help="estimate what training a model takes, from its configuration alone")
    parser.add_argument("model", help="causal language model: a folder with a config.json, or a name on the hub")
    parser.add_argument("--batch", type=count, default=1, help="sequences that a device processes at a time")
    parser.add_argument("--seq", type=count, default=512, help="tokens per sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the base of SMT and LoRA: NF4 or LLM.int8")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of each layer")
    parser.add_argument("--ranks", type=count, default=1, help="number of devices")
    parser.add_argument("--zero", type=int, choices=range(4), default=0, help="stage of ZeRO; 3 also for FSDP2")
    parser.add_argument("--card", type=amount, default=24.0, help="memory of a device in GiB")
    add_config_flags(parser, FIELDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what the run takes, beside LoRA and full fine-tuning; see `estimation/estimate.py` for each line."""
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
    print(f"blocks       {found.selection.summary().partition(';')[0]}")
    print(f"write-back   {_amount(found.write_back)} read and written after each step")
    print(f"delta        {_amount(found.delta)} on disk")
    print(f"warm-up sums {', '.join(f'{score} {_amount(size)}' for score, size in found.accumulators.items())}")

    columns = {"SMT": found.smt, "warm-up": found.warmup, f"LoRA r={found.lora_rank}": found.lora, "full": found.full}
    columns = {title: cost for title, cost in columns.items() if cost is not None}
    print(f"\n{'each device':<16}" + "".join(f"{title:>12}" for title in columns))
    for title, name in ROWS.items():
        print(f"{title:<16}" + "".join(f"{_amount(getattr(cost, name)):>12}" for cost in columns.values()))
    print(f"{'TFLOPs a step':<16}" + "".join(f"{cost.flops / 1e12:>12.4g}" for cost in columns.values()))

    spare = round(arguments.card * 2**30) - found.peak
    verdict = f"yes, {_amount(spare)} to spare" if spare >= 0 else f"no, {_amount(-spare)} too much"
    print(f"\nfits a {arguments.card:g} GB card: {verdict}")


def _amount(size: float) -> str:
    """Format bytes for people to read."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.{2 if unit else 0}f} {UNITS[unit]}"
