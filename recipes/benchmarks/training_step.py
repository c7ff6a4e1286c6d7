"""Measure time and memory of a training step: SMT against other methods with as many trained parameters.

python -m recipes.benchmarks.training_step --output recipes/benchmarks/results
"""

import argparse
import gc
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.benchmarks.parts.charts import draw
from recipes.benchmarks.parts.memory import account, peaks
from recipes.benchmarks.parts.methods import FLOOR, FULL, METHODS, OF_EXPERTS, SECOND_FLOOR, SMT, UNABLE, Variant
from recipes.benchmarks.parts.own_work import own_work
from recipes.benchmarks.parts.quantised import BITS
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.setting import DTYPES, GPU_SHAPES, SHAPES, Setting
from recipes.benchmarks.parts.tables import markdown
from recipes.benchmarks.parts.timing import Round, ratios, seconds, time_rounds
from recipes.benchmarks.parts.training import Training, copy_for, start

GROWTH = (0.001, 0.002, 0.005, 0.0084, 0.02, 0.05, 0.1)
# The lowest layers with blocks, as fractions of the depth, and a budget small enough for the topmost of them.
DEPTHS = (0, 0.25, 0.5, 0.75, 0.875)
DEPTHS_BUDGET = 0.0084


def compare(setting: Setting, methods: Sequence[str], budgets: Sequence[float], rounds: int) -> dict:
    """Measure all methods at all budgets, and the ratio of SMT's step time to that of each other method."""
    each = [Variant(method, budget) for budget in budgets for method in methods if method != FULL]
    first, second = Variant(FLOOR), Variant(SECOND_FLOOR)
    full = [Variant(FULL)] if FULL in methods else []
    middle = len(each) // 2
    variants = [first, *full, *each[:middle], second, *each[middle:]]
    # Peaks are measured first, while nothing else is in memory.
    peak_bytes = peaks({variant: partial(start, variant) for variant in variants}, setting)
    rows, samples = measure(setting, variants, rounds)
    sparse = [variant for variant in each if variant.method == SMT]
    return {
        "methods": [rows[variant] | {"peak_bytes": peak_bytes[variant]} for variant in (first, second, *full, *each)],
        "smt_to_others": [
            {"budget": smt.budget, "method": other.method, "ratio": ratios(samples, smt, [other])}
            for smt in sparse
            for other in (*full, *each)
            if other.method != SMT and other.budget in (None, smt.budget)
        ],
    }


def curves(setting: Setting, rounds: int) -> dict:
    """Measure SMT against the floor as the budget grows and as the lowest layer with blocks rises."""
    floors = [Variant(FLOOR), Variant(SECOND_FLOOR)]
    by_budget = [Variant(SMT, each) for each in GROWTH]
    layers = dict.fromkeys(int(depth * setting.shape.num_hidden_layers) for depth in DEPTHS)
    by_layer = [Variant(SMT, DEPTHS_BUDGET, layer) for layer in layers]
    rows, _ = measure(setting, [*floors, *by_budget, *by_layer], rounds)
    return {
        "floor": rows[floors[0]],
        "by_budget": [rows[variant] for variant in by_budget],
        "by_lowest_layer": [rows[variant] for variant in by_layer],
    }


def measure(setting: Setting, variants: Sequence[Variant], rounds: int) -> tuple[dict[Variant, dict], list[Round]]:
    """Return a row for each variant. The slow first step of each is counted but not timed."""
    # Models are reference cycles: those of an earlier call may still be in memory.
    gc.collect()
    model, tokens = setting.build(), setting.tokens()
    trainings = {
        variant: Training(copy_for(variant, model), variant, setting) for variant in tqdm(variants, "building")
    }
    accounts = {variant: account(training, tokens) for variant, training in tqdm(trainings.items(), "counting")}
    samples = time_rounds(trainings, tokens, rounds)
    floors = [variant for variant in variants if variant.method in (FLOOR, SECOND_FLOOR)]
    rows = {
        variant: variant._asdict()
        | accounts[variant]
        | {"to_floor": ratios(samples, variant, floors), "seconds": seconds(samples, variant)}
        | {"rounds": [sample[variant]._asdict() for sample in samples]}
        | ({"own_work": own_work(training, tokens, rounds)} if variant.method == SMT else {})
        for variant, training in trainings.items()
    }
    return rows, samples


def report(arguments: argparse.Namespace, shape: str) -> None:
    """Measure one shape and write its three files."""
    base = arguments.base
    dtype = arguments.dtype or ("bf16" if base or shape in GPU_SHAPES else "fp32")
    setting = Setting(
        SHAPES[shape],
        dtype,
        arguments.batch,
        arguments.length,
        arguments.checkpointing,
        arguments.chunked_loss,
        arguments.threads,
        base=base,
    )
    load = os.getloadavg()[0]
    methods = [method for method in arguments.methods if method not in UNABLE.get(base, ())]
    if setting.targets == "experts":
        methods = [method for method in methods if method in OF_EXPERTS]
    results = compare(setting, methods, arguments.budgets, arguments.rounds)
    if arguments.curve_rounds:
        results["curves"] = curves(setting, arguments.curve_rounds)
    results |= {
        "shape": shape,
        "parameters": setting.parameters(),
        **setting.circumstances("recipes.benchmarks.training_step", load),
    }
    options = [name for name in ("checkpointing", "chunked_loss") if getattr(arguments, name)]
    stem = "-".join(["step", shape, dtype, *([base] if base else []), *options]).replace("_", "-")
    write(results, arguments.output, stem)


def write(results: dict, folder: Path, stem: str) -> None:
    """Write the JSON, the tables and the chart."""
    write_results(folder, stem, results, markdown(results, f"{stem}.png"))
    draw(results, folder / f"{stem}.png")


def main(words: Sequence[str] | None = None) -> None:
    """Measure the given shapes. Without a GPU, skip those that need one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for a .json, .md and .png of each shape")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["smollm2-135m"], help="models to measure")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods besides the floor")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.0084, 0.05], help="fractions of all parameters")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each method")
    parser.add_argument("--curve-rounds", type=int, default=2, help="timed steps for the curves; 0 skips them")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32; bf16 with --base or if a GPU is needed")
    parser.add_argument("--base", choices=BITS, help="quantise the linears with bitsandbytes; default: plain weights")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--chunked-loss", action="store_true", help="compute the loss in chunks of tokens")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    arguments = parser.parse_args(words)
    for shape in arguments.shape:
        if shape in GPU_SHAPES and not torch.cuda.is_available():
            tqdm.write(f"Skipping {shape}: it needs a GPU.")
        else:
            report(arguments, shape)


if __name__ == "__main__":
    main()
