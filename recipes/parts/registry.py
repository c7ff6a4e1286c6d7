"""The tasks by name. Each is imported only when it is asked for."""

from importlib import import_module
from typing import Any

from recipes.parts.classification import Classification
from recipes.parts.task import Task

TASKS = {
    "commonsense": ("recipes.commonsense.task", "COMMONSENSE"),
    "math": ("recipes.math.task", "MATH"),
    "instruct": ("recipes.instruct.task", "INSTRUCT"),
    "sentiment": ("recipes.sentiment.task", "SENTIMENT"),
}
"""Name -> module and the object in it, for `recipes/finetune.py`."""

CLASSIFICATIONS = {"glue": ("recipes.glue.task", "GLUE"), "vision": ("recipes.vision.task", "VISION")}
"""The same for `recipes/classify.py`."""


def load_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ValueError: there is no such task.
    """
    return _load(TASKS, name)


def load_classification(name: str) -> Classification:
    """Return the classification task called `name`.

    Raises:
        ValueError: there is no such task.
    """
    return _load(CLASSIFICATIONS, name)


def _load(tasks: dict[str, tuple[str, str]], name: str) -> Any:
    if name not in tasks:
        raise ValueError(f"Expected a task among {', '.join(tasks)}; got {name!r}.")
    module, attribute = tasks[name]
    return getattr(import_module(module), attribute)
