"""The report of a training step, in Markdown."""

from recipes.benchmarks.parts.methods import UNABLE
from recipes.benchmarks.parts.quantised import NAMES
from recipes.parts.markdown import circumstances, mib, percent, spread, table

TRAINED = {"qkv": "the query, key and value projections", "experts": "the matrices of the experts"}


def markdown(results: dict, chart: str) -> str:
    """Return the text of the report. `chart` is the file name of its picture."""
    setting = results["setting"]
    other = {"processor": "clock", "clock": "processor"}[results["timer"]]
    floor = results["methods"][0]
    rounds = len(floor["rounds"])
    parts = [
        f"# A training step of {results['shape']}\n",
        f"{results['parameters']:,} random weights in {setting['dtype']}"
        f"{' under autocast' if setting['dtype'] == 'bf16' else ''}, "
        f"{setting['batch']} x {setting['length']} random tokens, activation checkpointing "
        f"{'on' if setting['checkpointing'] else 'off'}, loss "
        f"{'in chunks of tokens' if setting['chunked_loss'] else 'of all tokens at once'}, "
        f"`torch.optim.AdamW(fused=True)`. All methods train {TRAINED[setting.get('targets', 'qkv')]}. SMT blocks and "
        "rows are random. Adapters are PEFT's, with the rank that comes closest to the budget.\n",
        *([_about_base(setting["base"])] if setting["base"] else []),
        f"![Time and memory]({chart})\n",
        "## In short\n",
        summary(results),
        "## Time\n",
        f"Each of {rounds} rounds takes one step of each method, in a new random order. The floor is the same model "
        "with all weights frozen and backward through all layers. It runs twice: a ratio is to the mean of both in the "
        "same round, and their distance from 1 shows the noise. Medians (and quartiles), by time of the "
        f"{_timer(results['timer'])}.\n",
        table(
            f"method|budget|trainable|of all|to the floor|by time {_on(other)}|seconds|seconds {_on(other)}",
            [
                [row["method"], percent(row["budget"]), f"{row['trainable']:,}"]
                + [f"{100 * row['trainable'] / results['parameters']:.3f} %"]
                + [spread(row["to_floor"][timer]) for timer in (results["timer"], other)]
                + [f"{row['seconds'][timer]['median']:.3f}" for timer in (results["timer"], other)]
                for row in results["methods"]
            ],
        ),
        "## What SMT adds to the floor\n",
        "SMT's own parts of a step, each timed where it runs, in % of that step. Finer than step ratios.\n",
        table(
            "budget|" + "|".join(_own(results)[0]["own_work"]) + "|together",
            [
                [percent(row["budget"])]
                + [f"{100 * part[results['timer']]['median']:.2f}" for part in row["own_work"].values()]
                + [f"{100 * sum(part[results['timer']]['median'] for part in row['own_work'].values()):.2f}"]
                for row in _own(results)
            ],
        ),
        "## SMT's time to that of the others\n",
        table(
            "method|budget|ratio",
            [
                [row["method"], percent(row["budget"]), spread(row["ratio"][results["timer"]])]
                for row in results["smt_to_others"]
            ],
        ),
        "## Memory and arithmetic\n",
        "MiB. Peak: peak memory of a step above the model alone, in its own process "
        f"({'allocated on the GPU' if results['timer'] == 'clock' else 'resident'}). Live: all tensors at the peak, "
        "weights and optimizer state included. Saved: what autograd keeps from forward for backward, without "
        "parameters. FLOPs: those of matrix products outside fused attention, as torch counts them.\n",
        table(
            "method|budget|peak|live|live, to the floor|saved|gradients|optimizer|GFLOP|GFLOP, to the floor",
            [
                [row["method"], percent(row["budget"]), mib(row["peak_bytes"]), mib(row["live_bytes"])]
                + [f"{row['live_bytes'] / floor['live_bytes']:.3f}"]
                + [mib(row[f"{what}_bytes"]) for what in ("saved", "gradient", "optimizer")]
                + [f"{row['flops'] / 1e9:.4g}", f"{row['flops'] / floor['flops']:.3f}"]
                for row in results["methods"]
            ],
        ),
        *(_curves(results["curves"], results["timer"]) if "curves" in results else []),
        circumstances(results),
    ]
    return "\n".join(parts)


def summary(results: dict) -> str:
    """Return the table of ratios to the floor, one line for each method and budget."""
    floor, timer = results["methods"][0], results["timer"]
    return table(
        "method|budget|step time / floor|live memory / floor|saved for backward / floor|FLOPs / floor|optimizer, MiB",
        [
            [row["method"], percent(row["budget"]), f"{row['to_floor'][timer]['median']:.2f}"]
            + [f"{row[what] / floor[what]:.3f}" for what in ("live_bytes", "saved_bytes", "flops")]
            + [mib(row["optimizer_bytes"])]
            for row in results["methods"]
        ],
    )


def _about_base(base: str) -> str:
    return (
        f"All linears but the output embeddings are held by bitsandbytes, as transformers loads them: {NAMES[base]}. "
        "On a CPU it makes a dense copy of a weight for each product; SMT puts its blocks into such a copy. Left out, "
        f"since they cannot train over such weights: {', '.join(UNABLE[base])}.\n"
    )


def _curves(curves: dict, timer: str) -> list[str]:
    floor = curves["floor"]

    def rows(name: str, label) -> list[list[str]]:
        return [
            [label(row), f"{row['trainable']:,}", spread(row["to_floor"][timer])]
            + [f"{row[what] / floor[what]:.3f}" for what in ("live_bytes", "flops")]
            for row in curves[name]
        ]

    header = "trainable|time|live|GFLOP"
    return [
        "## SMT as its budget grows\n",
        f"Ratios to the floor; rounds: {len(floor['rounds'])}.\n",
        table(f"budget|{header}", rows("by_budget", lambda row: percent(row["budget"]))),
        "## SMT as its lowest layer with blocks rises\n",
        f"Budget {percent(curves['by_lowest_layer'][0]['budget'])}. SMT's backward stops at this layer; the floor's "
        "goes through all layers.\n",
        table(f"layer|{header}", rows("by_lowest_layer", lambda row: str(row["lowest_layer"]))),
    ]


def _own(results: dict) -> list[dict]:
    curves = results.get("curves", {"by_budget": []})
    rows = [*results["methods"], *curves["by_budget"]]
    return [row for row in rows if "own_work" in row]


def _timer(timer: str) -> str:
    return {"processor": "processor, over all threads", "clock": "clock"}[timer]


def _on(timer: str) -> str:
    return {"processor": "of the processor", "clock": "on the clock"}[timer]
