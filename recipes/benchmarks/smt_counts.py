"""Count what SMT's tables train, and compare with the percentages in the paper (He et al., 2405.15525).

python -m recipes.benchmarks.smt_counts --output recipes/benchmarks/results

A budget p of P parameters is n blocks of m = 256 x 256 weights, with n m as near to p P as whole blocks allow. The
percentages that PEFT and the authors' code print add the t trained parameters to the total once more, p' = t / (P + t),
so a printed p' is a budget of p' / (1 - p'). LoRA and DoRA are PEFT's, with adapters on q, k, v, up and down. Where the
rank is unknown, it is the one nearest to the printed percentage: t is linear in the rank. All models are on the meta
device; which blocks are chosen does not change their number.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import LlamaForCausalLM

from recipes.benchmarks.parts.models import MODELS, Shape
from recipes.benchmarks.parts.results import write_results
from recipes.parts.markdown import provenance_rows, table
from recipes.parts.provenance import provenance
from smt_trainer import BlockScores, BlockSelection, SMTConfig

PACKAGES = ("torch", "transformers", "peft", "smt_trainer")
SEED, BLOCK = 0, 256
SHAPES = {
    "LLaMA-7B": MODELS["Llama-2-7B"],
    "LLaMA-13B": Shape(40, 5120, 40, 40, 13824, 32000),
    "LLaMA2-7B": MODELS["Llama-2-7B"],
    "LLaMA3-8B": MODELS["Llama-3-8B"],
}
ADAPTED = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Model -> percentages of SMT, and the tables they are in.
SMT = {
    "LLaMA-7B": {0.43: "3", 0.84: "2, 3, 6", 0.86: "5", 1.26: "1, 3, 5", 2.50: "3", 3.73: "3", 4.91: "2, 3"},
    "LLaMA-13B": {0.68: "2", 4.91: "2"},
    "LLaMA2-7B": {0.43: "3", 0.84: "2, 3", 1.26: "3", 2.50: "3", 3.73: "3", 4.91: "2, 3"},
    "LLaMA3-8B": {0.71: "2", 3.01: "2"},
}
# Table 4, LLaMA-7B: percentages of MLPs and of attention.
TABLE_4 = [(0.84, 0.0), (0.42, 0.42), (0.21, 0.63), (0.0, 0.84)]
# Model, method, rank if known, percentage, tables. Table 2's are from Liu et al. (2402.09353), who give the ranks.
ADAPTERS = [
    ("LLaMA-7B", "LoRA", 32, 0.83, "2"),
    ("LLaMA-7B", "DoRA", 32, 0.84, "2"),
    ("LLaMA-13B", "LoRA", 32, 0.67, "2"),
    ("LLaMA-13B", "DoRA", 32, 0.68, "2"),
    ("LLaMA2-7B", "LoRA", 32, 0.83, "2"),
    ("LLaMA2-7B", "DoRA", 16, 0.42, "2"),
    ("LLaMA3-8B", "LoRA", 32, 0.70, "2"),
    ("LLaMA3-8B", "DoRA", 32, 0.71, "2"),
    ("LLaMA-7B", "LoRA", None, 1.26, "1"),
    ("LLaMA-7B", "DoRA", None, 1.27, "1"),
    *(
        ("LLaMA-7B", method, None, percentage, tables)
        for percentage, tables in {0.43: "3", 0.86: "5", 2.50: "3", 3.73: "3", 4.91: "3"}.items()
        for method in ("LoRA", "DoRA")
    ),
]


def measure() -> dict:
    """Count for all settings, and return the contents of `smt_counts.json`."""
    return {
        "smt": [
            count_blocks(model, percentage) | {"tables": tables}
            for model, percentages in tqdm(SMT.items(), "models")
            for percentage, tables in percentages.items()
        ],
        "table_4": [count_groups(*shares) for shares in TABLE_4],
        "table_6": [count_projection(name) for name in ("k_proj", "q_proj", "v_proj")],
        "adapters": [count_adapters(*setting[:4]) | {"tables": setting[4]} for setting in tqdm(ADAPTERS, "adapters")],
        **provenance("recipes.benchmarks.smt_counts", PACKAGES),
        "seed": SEED,
    }


def build(model: str) -> LlamaForCausalLM:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return SHAPES[model].build()


def select(model: str, **fields) -> BlockSelection:
    """Choose random blocks of 256 x 256."""
    config = SMTConfig(score="random", block_size=BLOCK, **fields)
    return BlockScores.of(build(model), config, [], SEED).select()


def count_blocks(model: str, percentage: float) -> dict:
    """Count the blocks of q, k and v for a percentage of all parameters, and for the same percentage as printed."""
    share = percentage / 100
    selection, printed = select(model, budget=share), select(model, budget=share / (1 - share))
    return {
        "model": model,
        "paper": percentage,
        "blocks": selection.num_blocks,
        "trained": selection.trainable_parameters,
        "parameters": selection.num_parameters,
        "printed": printed.num_blocks,
    }


def count_groups(mlp: float, attention: float) -> dict:
    """Count the blocks of LLaMA-7B's MLPs and of its q, k and v for a percentage of each."""
    budget = {group: share / 100 for group, share in {"mlp": mlp, "qkv": attention}.items() if share}
    targets = {"mlp": ["gate_proj", "up_proj", "down_proj"], "qkv": ["q_proj", "k_proj", "v_proj"]}
    selection = select("LLaMA-7B", budget=budget, target_modules=[name for group in budget for name in targets[group]])
    counts = selection.blocks_by_projection()
    blocks = {group: sum(counts.get(name, 0) for name in names) for group, names in targets.items()}
    return {"paper": [mlp, attention], "blocks": blocks}


def count_projection(name: str) -> dict:
    """Count the blocks for table 6's 0.84 % in one projection of LLaMA-7B, and all blocks of the projection."""
    selection = select("LLaMA-7B", budget=0.0084, target_modules=[name])
    candidates = sum(grid.num_blocks for grid in selection.grids.values())
    return {"projection": name, "blocks": selection.num_blocks, "candidates": candidates}


def count_adapters(model: str, method: str, rank: int | None, percentage: float) -> dict:
    """Count what LoRA or DoRA trains, by default at the rank nearest to a percentage as PEFT prints it."""
    known = rank is not None
    if rank is None:
        (first, total), (second, _) = peft_counts(model, method, 1), peft_counts(model, method, 2)
        share = percentage / 100
        rank = 1 + round((share / (1 - share) * (total - first) - first) / (second - first))
    trained, total = peft_counts(model, method, rank)
    return {
        "model": model,
        "method": method,
        "rank": rank,
        "known": known,
        "paper": percentage,
        "trained": trained,
        "parameters": total - trained,
    }


def peft_counts(model: str, method: str, rank: int) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters of PEFT's model."""
    with torch.device("meta"):
        config = LoraConfig(r=rank, target_modules=ADAPTED, use_dora=method == "DoRA")
        return get_peft_model(build(model), config).get_nb_trainable_parameters()


def markdown(results: dict) -> str:
    """Return the text of `smt_counts.md`."""
    smt = [
        [
            one["model"],
            one["tables"],
            f"{one['paper']:.2f}",
            f"{one['blocks']:,}",
            f"{one['trained'] / 1e6:.2f}",
            f"{100 * one['trained'] / one['parameters']:.4f}",
            f"{one['printed']:,}",
        ]
        for one in results["smt"]
    ]
    groups = [
        [*(f"{share:.2f}" for share in one["paper"]), *(f"{one['blocks'][group]:,}" for group in ("mlp", "qkv"))]
        for one in results["table_4"]
    ]
    projections = [[f"`{one['projection']}`", str(one["blocks"]), str(one["candidates"])] for one in results["table_6"]]
    adapters = [
        [
            one["model"],
            one["method"],
            one["tables"],
            f"{one['rank']}{'' if one['known'] else ' (nearest)'}",
            f"{one['trained'] / 1e6:.2f}",
            f"{100 * one['trained'] / (one['parameters'] + one['trained']):.3f}",
            f"{100 * one['trained'] / one['parameters']:.3f}",
            f"{one['paper']:.2f}",
        ]
        for one in results["adapters"]
    ]
    return "\n".join(
        [
            "# What SMT trains\n",
            "Percentages of all parameters, as in the paper's `#Params%`. `blocks`: of 256 x 256 weights, that "
            "`SMTConfig(budget=...)` makes of the paper's percentage, and what these are. `printed`: blocks for the "
            "same percentage where the blocks count among all parameters once more, as the authors' code prints it.\n",
            table("model|tables|paper|blocks|millions|%|printed", smt),
            "Table 4, LLaMA-7B, percentages and blocks:\n",
            table("MLPs|attention|blocks of MLPs|blocks of q, k, v", groups),
            "Table 6, LLaMA-7B, 0.84 % in one projection:\n",
            table("projection|blocks|of", projections),
            "LoRA and DoRA on q, k, v, up and down, counted by PEFT:\n",
            table("model|method|tables|rank|millions|% as PEFT prints it|% of the model|paper", adapters),
            ABOUT,
            table("|", provenance_rows(results)),
        ]
    )


ABOUT = """\
- A block is at most 0.001 % of these models, so each budget comes out to the paper's digits. The paper does not say
  which of the two ways it counts; at 4.91 % they are 5 % of the blocks apart. Its LoRA and DoRA are as PEFT prints
  them: so come out all of table 2 but one, and three of them not as a share of the model.
- The one is 0.42 for LLaMA2-7B's DoRA, of rank 16. It is 0.43, as in table 3 and in Liu et al.
- The paper's text has 0.86, 0.43, 0.62 and 0.21 where its table 4 has 0.84, 0.42, 0.63 and 0.21.
- Larger ranks are not stated. 49 gives both percentages of table 1. No rank gives LoRA and DoRA the same 0.86, 2.50,
  3.73 or 4.91, so these are percentages of SMT, which the others come near to.
"""


def main() -> None:
    """Count and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for smt_counts.json and .md")
    arguments = parser.parse_args()
    results = measure()
    write_results(arguments.output, "smt_counts", results, markdown(results))


if __name__ == "__main__":
    main()
