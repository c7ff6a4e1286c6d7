import hashlib
import random
import sys
import zipfile
from types import ModuleType

import pytest

from recipes.math.parts import generators as module
from recipes.math.parts.generators import generators
from recipes.parts import wheels

FOLDER = "reasoning_gym/arithmetic/gsm_symbolic"
FUNCTION = """
from reasoning_gym.utils import text
def generate_{number}(rng):
    return {{"question": text({number}, rng.random())}}
"""


@pytest.fixture
def wheel(monkeypatch):
    """A wheel with two templates and a flawed one, whose packages cannot be imported as such."""
    path = wheels.cache_dir() / "wheels" / "carrier.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("reasoning_gym", "reasoning_gym/arithmetic", FOLDER):
            archive.writestr(f"{package}/__init__.py", "import what_is_not_installed")
        archive.writestr("reasoning_gym/utils.py", "def text(*words): return ' '.join(map(str, words))")
        archive.writestr(f"{FOLDER}/generators_00_49.py", FUNCTION.format(number=1) + FUNCTION.format(number=25))
        archive.writestr(f"{FOLDER}/generators_50_99.py", FUNCTION.format(number=99))
    carrier = wheels.Wheel("carrier", "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "REASONING_GYM", carrier)
    return path


def test_the_templates_come_by_number_without_the_flawed_ones(wheel):
    found = generators()
    assert list(found) == [1, 99]
    assert found[99](random.Random(0))["question"] == f"99 {random.Random(0).random()}"


def test_an_imported_reasoning_gym_is_untouched(wheel, monkeypatch):
    installed = {name: ModuleType(name) for name in ("reasoning_gym", "reasoning_gym.utils")}
    for name, imported in installed.items():
        monkeypatch.setitem(sys.modules, name, imported)
    generators()
    assert {name: found for name, found in sys.modules.items() if name.startswith("reasoning_gym")} == installed


def test_nothing_of_a_damaged_wheel_is_imported(wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "")
    with pytest.raises(wheels.FetchError, match="is damaged"):
        generators()
