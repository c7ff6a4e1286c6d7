"""Keep the evaluation of the untuned model in the output folder, so that a resumed run does not repeat it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel

from recipes.parts.evaluation import Evaluation
from recipes.parts.json_file import write_json
from recipes.parts.task import FIELDS, Decoding, Task
from smt_trainer.model.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

FILE = "before.json"


@dataclass(frozen=True)
class Subject:
    """What an evaluation depends on: equal subjects have equal results.

    Attributes:
        task: name of the task.
        model: fingerprint of the values of the weights.
        questions: SHA-256 of all questions, in their order.
        decoding: how they are answered, without the size of batches, which does not matter.
    """

    task: str
    model: str
    questions: str
    decoding: dict[str, bool | int]

    @classmethod
    def of(cls, task: Task, model: PreTrainedModel, questions: Mapping[str, Dataset], decoding: Decoding) -> "Subject":
        """Describe an evaluation. If the model is sharded, all ranks must call this together."""
        texts = {name: asked.select_columns(list(FIELDS)).to_dict() for name, asked in questions.items()}
        how = {setting: value for setting, value in asdict(decoding).items() if setting != "batch_tokens"}
        return cls(
            task=task.name,
            model=Fingerprint.of(model, model.dtype).digest,
            questions=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            decoding=how,
        )


def keep(evaluation: Evaluation, subject: Subject, output: Path) -> None:
    """Write an evaluation into the output folder."""
    write_json(output / FILE, asdict(subject) | asdict(evaluation))


def kept(subject: Subject, output: Path) -> Evaluation | None:
    """Return the evaluation in the output folder, or None if there is none or it has another subject."""
    path = output / FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    described = {key: content.pop(key, None) for key in asdict(subject)}
    if described != asdict(subject):
        changed = [key for key, value in asdict(subject).items() if described[key] != value]
        logger.info("%s is from another run (%s differ); evaluating again", path, ", ".join(changed))
        return None
    return Evaluation(**content)
