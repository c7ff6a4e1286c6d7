"""Measure how long it takes to switch the delta of a model in memory, compared with switching LoRA adapters in PEFT.

python -m recipes.benchmarks.swap --output recipes/benchmarks/results

There are two deltas for one base, and two LoRA adapters with as many weights on a copy of it. Each round switches from
one to the other in both, and runs a forward of the plain base, the base with a delta swapped in, and PEFT's model, in a
new random order.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from tqdm import tqdm

from recipes.benchmarks.parts.models import MODELS, Shape
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.timing import quartiles
from recipes.parts.adapters import adapter_config
from recipes.parts.markdown import percent, provenance_rows, spread, table
from recipes.parts.methods import trained_parameters
from recipes.parts.provenance import provenance
from smt_trainer import BlockScores, Delta, SMTConfig, convert_to_smt, swap
from smt_trainer.model.targets import count_parameters, find_targets
from smt_trainer.sparse.block_module import block_modules

PACKAGES = ("torch", "transformers", "peft", "smt_trainer")
SEED, MODEL, TOKENS = 0, "SmolLM2-135M", 128
BUDGETS = (0.0084, 0.05)
CHANGES, FORWARDS = ("swap", "set_adapter"), ("the base", "a swapped delta", "an adapter")


def measure(shape: Shape, budgets: tuple[float, ...], rounds: int) -> dict:
    """Measure a model, and return the contents of `swap.json`."""
    return {
        "model": MODEL,
        "tokens": TOKENS,
        "budgets": [measure_budget(shape, budget, rounds) for budget in budgets],
        "rounds": rounds,
        **provenance("recipes.benchmarks.swap", PACKAGES),
        "seed": SEED,
    }


def measure_budget(shape: Shape, budget: float, rounds: int) -> dict:
    """Return the seconds of each action at one budget, and the number of trained weights of both methods."""
    torch.manual_seed(SEED)
    base = shape.build().eval()
    adapted, trained = with_adapters(copy.deepcopy(base), budget)
    deltas = [tuned(base, budget, seed) for seed in range(2)]
    plain, ids = copy.deepcopy(base), torch.randint(shape.vocab_size, (1, TOKENS))
    actions: dict[str, Callable] = {
        "swap": lambda number: swap(base, deltas[number % 2]),
        "set_adapter": lambda number: adapted.set_adapter("default" if number % 2 else "other"),
        "the base": lambda number: plain(ids),
        "a swapped delta": lambda number: base(ids),
        "an adapter": lambda number: adapted(ids),
    }
    seconds: dict[str, list[float]] = {action: [] for action in actions}
    order, shuffle = list(actions), random.Random(SEED).shuffle
    with torch.no_grad():
        # The first round warms up.
        for number in tqdm(range(rounds + 1), f"{100 * budget:g} %"):
            shuffle(order)
            for action in order:
                started = time.perf_counter()
                actions[action](number)
                seconds[action] += [time.perf_counter() - started] * bool(number)
    return {
        "budget": budget,
        "swapped_weights": sum(blocks.numel() for blocks in deltas[0].blocks.values()),
        "adapter_weights": trained,
        "seconds": {action: quartiles(found) for action, found in seconds.items()},
        "to_base": {
            action: quartiles([one / plain for one, plain in zip(seconds[action], seconds["the base"], strict=True)])
            for action in FORWARDS
        },
    }


def tuned(base: nn.Module, budget: float, seed: int) -> Delta:
    """Return a delta of random blocks of a base, each value changed."""
    model, config = copy.deepcopy(base), SMTConfig(budget=budget, score="random")
    convert_to_smt(model, BlockScores.of(model, config, [], seed).select())
    with torch.no_grad():
        for _, linear in block_modules(model):
            linear.blocks += 1
    return Delta.of(model)


def with_adapters(model: nn.Module, budget: float) -> tuple[peft.PeftModel, int]:
    """Return a model with two LoRA adapters, and the number of weights of each."""
    targets = find_targets(model, SMTConfig())
    config = adapter_config("LoRA", targets, budget * count_parameters(model), SEED)
    adapted = peft.get_peft_model(model, config)
    trained = trained_parameters(adapted)
    adapted.add_adapter("other", config)
    return adapted.eval(), trained


def markdown(results: dict) -> str:
    """Return the text of `swap.md`."""
    rows, forwards = [], []
    for one in results["budgets"]:
        counts = {"swap": one["swapped_weights"], "set_adapter": one["adapter_weights"]}
        rows += [
            [percent(one["budget"]), f"`{action}`", f"{counts[action]:,}", spread(milliseconds(one["seconds"][action]))]
            for action in CHANGES
        ]
        forwards += [
            [
                percent(one["budget"]),
                action,
                spread(milliseconds(one["seconds"][action])),
                spread(one["to_base"][action]),
            ]
            for action in FORWARDS
        ]
    return "\n".join(
        [
            "# What it takes to change the delta of a model in memory\n",
            f"{results['model']}'s shape with random weights in float32, one base in memory. `swap` is ours; "
            "`set_adapter` is PEFT's, for LoRA with as many weights. Milliseconds: medians (and quartiles) of "
            f"{results['rounds']} interleaved rounds.\n",
            table("budget|change|weights|milliseconds", rows),
            f"A forward of {results['tokens']} tokens, without gradients:\n",
            table("budget|forward of|milliseconds|to the base", forwards),
            table("|", provenance_rows(results)),
        ]
    )


def milliseconds(quartiles: dict[str, float]) -> dict[str, float]:
    """Return quartiles of seconds in milliseconds."""
    return {name: 1000 * value for name, value in quartiles.items()}


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for swap.json and .md")
    parser.add_argument("--rounds", type=int, default=30, help="how often each is run")
    arguments = parser.parse_args()
    results = measure(MODELS[MODEL], BUDGETS, arguments.rounds)
    write_results(arguments.output, "swap", results, markdown(results))


if __name__ == "__main__":
    main()
