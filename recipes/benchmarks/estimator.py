"""Compare `smt estimate` with the measured training steps in a folder, and estimate a large model.

python -m recipes.benchmarks.estimator --results recipes/benchmarks/results
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from recipes.benchmarks.parts.methods import FULL, SMT
from recipes.benchmarks.parts.models import MODELS, Shape
from recipes.benchmarks.parts.quantised import BITS
from recipes.benchmarks.parts.results import write_results
from recipes.benchmarks.parts.setting import DTYPES
from recipes.parts.markdown import gib, mib, percent, table
from recipes.parts.provenance import command
from smt_trainer import SMTConfig
from smt_trainer.estimation.estimate import estimate

LARGE = "Llama-2-7B"
# Method -> its name in the estimate.
ESTIMATED = {SMT: "smt", "LoRA": "lora", FULL: "full"}


def is_modelled(results: dict) -> bool:
    """Return whether the estimator models this step: it has no loss in chunks, and no experts as targets."""
    setting = results["setting"]
    return not setting["chunked_loss"] and setting.get("targets") != "experts"


def compare(results: dict) -> list[dict]:
    """Return measured and estimated peak memory in bytes for each method and budget of one result."""
    setting, rows = results["setting"], []
    base = setting.get("base")
    measured = {(row["method"], row["budget"]): row for row in results["methods"]}
    config = Shape(**setting["shape"]).config()
    for budget in dict.fromkeys(row["budget"] for row in results["methods"] if row["method"] == SMT):
        found = estimate(
            config,
            SMTConfig(budget=budget, score="random", scope="per_module"),
            batch=setting["batch"],
            seq=setting["length"],
            dtype=DTYPES[setting["dtype"]],
            checkpointing=setting["checkpointing"],
            bits=BITS.get(base),
        )
        for method, name in ESTIMATED.items():
            row, cost = measured.get((method, None if method == FULL else budget)), getattr(found, name)
            if row is not None:
                rows.append(
                    {"shape": results["shape"], "dtype": setting["dtype"], "base": base}
                    | {"checkpointing": setting["checkpointing"]}
                    | {"method": method, "budget": row["budget"]}
                    | {"measured_bytes": row["live_bytes"], "estimated_bytes": cost.peak}
                )
    return list({(row["method"], row["budget"]): row for row in rows}.values())


def plan() -> list[list[str]]:
    """Return the rows of a table: peak memory in GiB for LLaMA-2-7B, its weights in 16, 8 and 4 bits."""
    rows = []
    for bits in (None, 8, 4):
        found = estimate(
            MODELS[LARGE].config(),
            SMTConfig(),
            batch=16,
            seq=512,
            dtype=torch.bfloat16,
            checkpointing=True,
            bits=bits,
        )
        smt, full = found.smt, "" if bits else gib(found.full.peak)
        rows.append(
            [str(bits or 16), gib(smt.weights), gib(smt.activations), gib(smt.peak), gib(found.lora.peak), full]
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the text of `estimator.md`."""
    return "\n".join(
        [
            "# The estimator and the measurements\n",
            "`smt estimate` reads only a configuration. Measured: all tensors alive at the peak of a real step "
            "(`step-*.md`). MiB.\n",
            table(
                "model|dtype|base|checkpointing|method|budget|measured|estimated|ratio",
                [
                    [
                        row["shape"],
                        row["dtype"],
                        row["base"] or "",
                        "on" if row["checkpointing"] else "off",
                        row["method"],
                        percent(row["budget"]),
                        mib(row["measured_bytes"]),
                        mib(row["estimated_bytes"]),
                        f"{row['estimated_bytes'] / row['measured_bytes']:.3f}",
                    ]
                    for row in rows
                ],
            ),
            f"## {LARGE}, not measured\n",
            "bf16, 16 x 512 tokens, activations checkpointed, 0.84 % in blocks of 256x256; GiB. Peaks are those of a "
            "training step. The warm-up of `grad_l1` holds sums as large as the targets besides: 6 GiB, or none with "
            "`accumulator_device='cpu'`. bitsandbytes' linears of 8 bits keep their inputs whatever is checkpointed.\n",
            table("bits|weights|activations|peak of SMT|of LoRA|of full fine-tuning", plan()),
            f"Command: `{command('recipes.benchmarks.estimator')}`\n",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Compare all results of the folder that the estimator models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of step-*.json; the comparison is written there"
    )
    folder = parser.parse_args(words).results
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("step-*.json"))]
    rows = [row for results in filter(is_modelled, found) for row in compare(results)]
    write_results(folder, "estimator", rows, markdown(rows))


if __name__ == "__main__":
    main()
