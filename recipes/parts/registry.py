"""The tasks by name. A task is imported when it is asked for."""

from importlib import import_module

from recipes.parts.task import Task

TASKS = {
    "commonsense": ("recipes.commonsense.task", "COMMONSENSE"),
    "math": ("recipes.math.task", "MATH"),
    "instruct": ("recipes.instruct.task", "INSTRUCT"),
}
"""Name -> module and the object in it."""


def load_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"Expected a task among {', '.join(TASKS)}; got {name!r}.")
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)
