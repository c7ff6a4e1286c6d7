"""Measure time, FLOPs and memory of a training step of ResNet-50 that trains rows of its convolutions, all or nothing.

python -m recipes.benchmarks.convolution_step --output recipes/benchmarks/results

Rows are random, the same fraction of each convolution. `frozen` trains nothing, but backward goes through all layers
down to the images. Each round takes one step of each variant, in a new random order.
"""

import argparse
import copy
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from recipes.benchmarks.parts.image_models import images, resnet50
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.timing import quartiles, timed
from recipes.parts.markdown import mib, percent, provenance_rows, spread, table
from recipes.parts.provenance import provenance
from smt_trainer import BlockScores, SMTConfig, convert_to_smt

PACKAGES = ("torch", "transformers", "smt_trainer")
SEED, LABELS = 0, 100
FROZEN, ROWS, FULL = "frozen", "rows", "full"


class Step:
    """A model that is trained in part, and its training step."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model.train(), batch
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters) if self.parameters else None

    def backward(self) -> None:
        """Run forward and backward."""
        # Otherwise nothing in a frozen model would require a gradient.
        pixels = self.batch["pixel_values"].detach().requires_grad_()
        self.model(**self.batch | {"pixel_values": pixels}).loss.backward()

    def __call__(self) -> None:
        """Take one whole step."""
        self.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def trained_rows(model: nn.Module, budget: float) -> nn.Module:
    """Rewrite a model so that a fraction of the rows of each convolution is trained."""
    config = SMTConfig(
        target_modules="all-conv",
        granularity="row",
        scope="per_module",
        score="random",
        budget=budget,
        modules_to_save=[],
    )
    return convert_to_smt(model, BlockScores.of(model, config, [], SEED).select())


def count(step: Step) -> dict[str, int]:
    """Return trained parameters, FLOPs, and bytes that autograd keeps for backward besides weights and buffers."""
    own = {each.untyped_storage().data_ptr() for each in (*step.model.parameters(), *step.model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        step.backward()
    step.model.zero_grad()
    return {
        "trainable": sum(parameter.numel() for parameter in step.parameters),
        "flops": counter.get_total_flops(),
        "saved_bytes": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    }


def measure(build: Callable[[int], nn.Module], batch: int, edge: int, budgets: tuple[float, ...], rounds: int) -> dict:
    """Measure all variants, and return the contents of `convolution_step.json`."""
    torch.manual_seed(SEED)
    load, base, data = os.getloadavg()[0], build(LABELS), images(batch, edge, LABELS, SEED)
    ways: dict[str, Callable] = {FROZEN: lambda model: model.requires_grad_(False)}
    ways |= {f"{ROWS}, {percent(budget)}": partial(trained_rows, budget=budget) for budget in budgets}
    ways[FULL] = lambda model: model
    steps = {name: Step(way(copy.deepcopy(base)), data) for name, way in ways.items()}
    counts = {name: count(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(SEED).shuffle
    # The first round warms up.
    for number in tqdm(range(rounds + 1), "rounds"):
        shuffle(order)
        for name in order:
            seconds[name] += [timed(steps[name]).processor] * bool(number)
    return {
        "model": f"ResNet-50 with {LABELS} labels, {batch} images of {edge}x{edge}",
        "steps": {
            name: counts[name]
            | {"seconds": quartiles(seconds[name])}
            | {"to_frozen": quartiles([a / b for a, b in zip(seconds[name], seconds[FROZEN], strict=True)])}
            for name in steps
        },
        "rounds": rounds,
        "load": [load, os.getloadavg()[0]],
        **provenance("recipes.benchmarks.convolution_step", PACKAGES),
        "seed": SEED,
    }


def markdown(results: dict) -> str:
    """Return the text of `convolution_step.md`."""
    floor = results["steps"][FROZEN]
    rows = [
        [
            name,
            f"{one['trainable']:,}",
            f"{one['flops'] / floor['flops']:.3f}",
            mib(one["saved_bytes"]),
            f"{one['seconds']['median']:.3f}",
            spread(one["to_frozen"]),
        ]
        for name, one in results["steps"].items()
    ]
    return "\n".join(
        [
            "# A training step of convolutions\n",
            f"{results['model']}, random weights in float32; AdamW. `rows` trains as many random rows of each "
            "convolution; `frozen` goes backward through all layers and trains nothing. FLOPs are those of "
            "convolutions and products, relative to `frozen`; saved is what autograd keeps from forward, in MiB, "
            f"beside weights. Seconds of the processor: medians (and quartiles) of {results['rounds']} interleaved "
            "rounds.\n",
            table("trained|weights|FLOPs|saved|seconds|to frozen", rows),
            f"Load at start and end: {', '.join(f'{load:.1f}' for load in results['load'])}.\n",
            table("|", provenance_rows(results)),
        ]
    )


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for convolution_step.json and .md")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each")
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    parser.add_argument("--edge", type=int, default=128, help="pixels of an edge")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05], help="fractions of all parameters")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure(resnet50, arguments.batch, arguments.edge, tuple(arguments.budgets), arguments.rounds)
    write_results(arguments.output, "convolution_step", results, markdown(results))


if __name__ == "__main__":
    main()
