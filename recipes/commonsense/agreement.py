"""Ask lm-evaluation-harness the questions of a finished run, and compare its answers with the recipe's, one by one.

make commonsense test-clients
.venv-clients/bin/python -m recipes.commonsense.agreement runs/commonsense --output recipes/commonsense/results

Both evaluate the base, the trained model (base and delta) and the merged checkpoint, all in float32: in bfloat16,
likelihoods tie.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.parts.harness import ask, write_tasks
from recipes.commonsense.task import COMMONSENSE, LIKELIEST
from recipes.parts.experiment import draw
from recipes.parts.json_file import write_json
from recipes.parts.markdown import provenance_rows, table
from recipes.parts.model import load_model, resolve_model
from recipes.parts.provenance import provenance
from recipes.parts.task import Decoding
from smt_trainer import from_delta
from smt_trainer.files import write_text

BATCH_TOKENS, BATCH = 4096, 8
PACKAGES = ("torch", "transformers", "lm_eval", "smt_trainer")
FORMS = ("base", "trained", "merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `make commonsense`")
    parser.add_argument("--questions", type=int, default=8, help="of each set")
    parser.add_argument("--output", type=Path, required=True, help="folder for agreement.json and agreement.md")
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    disable_progress_bars()

    results = json.loads((arguments.run / "results.json").read_text())
    base = resolve_model(results["model"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    test = COMMONSENSE.load(None, 0, results["seed"]).test
    questions = {name: draw(records, arguments.questions, results["seed"]) for name, records in test.items()}
    rows = [
        {"form": form} | compare(load_form(form, base, arguments.run, results["dtype"]), tokenizer, questions)
        for form in FORMS
    ]
    found = {
        "questions": sum(map(len, questions.values())),
        "rows": rows,
        "seed": results["seed"],
        **provenance("recipes.commonsense.agreement", PACKAGES),
    }
    write_json(arguments.output / "agreement.json", found)
    write_text(arguments.output / "agreement.md", markdown(found))


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: dict[str, Dataset]
) -> dict[str, float | int]:
    """Answer the questions by the recipe and by the harness, and count the equal answers."""
    decoding = Decoding(generate=False, batch_tokens=BATCH_TOKENS)
    ours = COMMONSENSE.evaluate(model, tokenizer, questions, decoding)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), questions)
        harness = HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=BATCH)
        theirs = ask(harness, Path(folder), {name: list(asked) for name, asked in questions.items()})
    alike = sum(
        ours_one == theirs_one
        for name, answers in theirs.items()
        for ours_one, theirs_one in zip(ours.answers[LIKELIEST][name], answers.choices, strict=True)
    )
    accuracy = sum(answers.accuracy for answers in theirs.values()) / len(theirs)
    return {"recipe": ours.average(LIKELIEST), "harness": accuracy, "alike": alike}


def load_form(form: str, base: str, run: Path, dtype: str) -> PreTrainedModel:
    """Load one of `FORMS` of a run's model in float32. The run trained in `dtype`."""
    if form == "trained":
        return from_delta(run / "delta", base=base, dtype=getattr(torch, dtype)).float()
    return load_model(base if form == "base" else str(run / "merged"), "float32")


def markdown(found: dict) -> str:
    """Return the text of `agreement.md`."""
    rows = [
        [
            row["form"],
            f"{100 * row['recipe']:.1f}",
            f"{100 * row['harness']:.1f}",
            f"{row['alike']} of {found['questions']}",
        ]
        for row in found["rows"]
    ]
    return "\n".join(
        [
            "# The recipe and lm-evaluation-harness on the same commonsense questions\n",
            "Accuracy by likelihood in %, and how many questions both answer alike.\n",
            table("model|recipe|harness|answers alike", rows),
            table("|", provenance_rows(found)),
        ]
    )


if __name__ == "__main__":
    main()
