"""Run every command of `smt` on deltas of a real model, as a user would, and measure time and size of output.

python -m recipes.benchmarks.verbs --output recipes/benchmarks/results
"""

import argparse
import filecmp
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, TrainingArguments

from recipes.benchmarks.parts.results import write_results
from recipes.parts.markdown import mib, provenance_rows, table
from recipes.parts.model import DEFAULT_MODEL, load_model, resolve_model
from recipes.parts.provenance import provenance
from smt_trainer import SMTConfig, SMTTrainer, delta_patches, swap
from smt_trainer.delta.folder import DELTA_FILE

SEEDS = (0, 1)
STEPS, LENGTH, BUDGET = 3, 64, 0.0084
WEIGHTS = "model.safetensors"
# What follows `smt` on the command line -> the folder that it writes.
COMMANDS = {
    "inspect first": None,
    "estimate base --batch 4 --seq 64": None,
    "merge base first merged": "merged",
    "verify base first merged": None,
    "verify base first merged --logits": None,
    "unmerge base first merged unmerged": "unmerged",
    "extract base merged extracted": "extracted",
    "extract base merged within --budget 8": "within",
    "diff first second": None,
    "compose base first second both": "both",
    "export base first adapter --format lora": "adapter",
}


def train(base: str, seed: int, folder: Path) -> None:
    """Write a delta of a few steps on random tokens."""
    model = load_model(base, "float32")
    generator = torch.Generator().manual_seed(seed)
    # The upper half of the vocabulary: plain words and pieces of words.
    tokens = torch.randint(model.config.vocab_size // 2, model.config.vocab_size, (16, LENGTH), generator=generator)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        seed=seed,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SMTTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        processing_class=AutoTokenizer.from_pretrained(base),
        smt_config=SMTConfig(budget=BUDGET, smt_warmup_steps=2),
    )
    trainer.train()
    trainer.save_model(str(folder))


def measure(folder: Path) -> list[dict]:
    """Run every command in a folder with `base`, `first` and `second`; return a row for each."""
    rows = [spent(words, written and folder / written, folder) for words, written in COMMANDS.items()]
    rows.append(of_call("delta_patches(base, first)", lambda: list(delta_patches(folder / "base", folder / "first"))))
    model = load_model(str(folder / "base"), "float32")
    swap(model, folder / "first")
    rows.append(of_call("swap(model, second)", lambda: swap(model, folder / "second")))
    return rows


def spent(words: str, written: Path | None, folder: Path) -> dict:
    """Run `smt` with these arguments; return seconds of the clock and of the processor, and the bytes written."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("smt"), *words.split()], cwd=folder, check=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(path.stat().st_size for path in written.rglob("*.safetensors")) if written else None
    return {"command": f"smt {words}", "clock": clock, "processor": processor, "bytes": size}


def of_call(words: str, action: Callable[[], object]) -> dict:
    """Time one call in this process."""
    processor, start = time.process_time(), time.perf_counter()
    action()
    clock, processor = time.perf_counter() - start, time.process_time() - processor
    return {"command": words, "clock": clock, "processor": processor, "bytes": None}


def proofs(folder: Path) -> dict[str, bool]:
    """Check what was written; return statement -> whether it holds."""

    def same(first: str, second: str) -> bool:
        return filecmp.cmp(folder / first / WEIGHTS, folder / second / WEIGHTS, shallow=False)

    spent("merge base extracted again", None, folder)
    return {
        "unmerged is base, byte for byte": same("unmerged", "base"),
        "base with extracted merged is merged, byte for byte": same("again", "merged"),
    }


def markdown(results: dict) -> str:
    """Return the text of `verbs.md`."""
    return "\n".join(
        [
            "# The commands of smt on a real model\n",
            f"{results['model']} in float32 ({mib(results['base_bytes'])} MiB), two deltas of {STEPS} steps on random "
            f"tokens at {100 * BUDGET:g} % of the parameters ({mib(results['delta_bytes'])} MiB each). Seconds of one "
            "run each, start of Python included; MiB of weights written.\n",
            table(
                "command|seconds, clock|seconds, processor|MiB",
                [
                    [f"`{row['command']}`", f"{row['clock']:.2f}", f"{row['processor']:.2f}", mib(row["bytes"])]
                    for row in results["rows"]
                ],
            ),
            *(f"- {statement}: {'yes' if holds else 'NO'}" for statement, holds in results["proofs"].items()),
            "",
            table("|", provenance_rows(results)),
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for verbs.json and .md")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="base: hub name or folder")
    arguments = parser.parse_args(words)
    base = Path(resolve_model(arguments.model)).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "base").symlink_to(base)
        for name, seed in zip(("first", "second"), SEEDS, strict=True):
            train(str(folder / "base"), seed, folder / name)
        results = {
            "model": Path(arguments.model).name,
            "base_bytes": (base / WEIGHTS).stat().st_size,
            "delta_bytes": (folder / "first" / DELTA_FILE).stat().st_size,
            "rows": measure(folder),
            "proofs": proofs(folder),
            "seed": SEEDS[0],
            **provenance("recipes.benchmarks.verbs", ("torch", "transformers", "smt_trainer")),
        }
    write_results(arguments.output, "verbs", results, markdown(results))


if __name__ == "__main__":
    main()
