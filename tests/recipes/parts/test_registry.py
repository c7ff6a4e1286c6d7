import pytest

from recipes.parts.registry import load_task


@pytest.mark.parametrize("name", ["math", "instruct"])
def test_a_task_is_found_by_its_name(name):
    task = load_task(name)
    assert task.name == name
    assert task.measures


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="Expected a task among commonsense, math, instruct, sentiment; got 'squad'"):
        load_task("squad")
