"""The question generators of GSM-Symbolic, imported from the wheel of reasoning-gym.

This is the only code from a wheel that is run, after `fetch` has verified the hash of the wheel.
"""

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from recipes.parts.wheels import REASONING_GYM, fetch

PACKAGES = ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic")
MODULES = ("generators_00_49", "generators_50_99")
PREFIX = "generate_"

FLAWED = frozenset(
    {
        # The package lists these as in need of a fix. Most round: 13.5 people are 13, 2.001 trips are 2.
        *(32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98),
        # The solution does not end in the answer's string: 24.0 for 24.
        *(25, 27, 84, 89),
        # The text shows the rounding of floats: 22.250000000000004 hours.
        *(46, 52, 66),
        # Some ages are below zero.
        24,
    }
)
"""Numbers of the templates left out."""

# Returns "question", "answer" and "metadata", whose "answer_cot" is the worked solution.
Generator = Callable[[random.Random], dict[str, Any]]


def generators() -> dict[int, Generator]:
    """Return template number -> function that draws a question, for all templates but the flawed ones.

    Raises:
        FetchError: the wheel is damaged, or is not in the cache and could not be downloaded.
    """
    named = {
        name: function
        for module in _import_modules(fetch(REASONING_GYM))
        for name, function in vars(module).items()
        if name.startswith(PREFIX)
    }
    numbered = {int(name.removeprefix(PREFIX)): function for name, function in named.items()}
    return {number: numbered[number] for number in sorted(numbered.keys() - FLAWED)}


def _import_modules(wheel: Path) -> list[ModuleType]:
    """Import the generators' modules from the archive, without the `__init__` of any package.

    These would import all of reasoning-gym and its dependencies. An installed reasoning-gym that was imported before is
    left as it is.
    """
    installed = _pop_modules()
    try:
        for name in PACKAGES:
            package = ModuleType(name)
            package.__path__ = [str(wheel.joinpath(*name.split(".")))]
            sys.modules[name] = package
        return [importlib.import_module(f"{PACKAGES[-1]}.{name}") for name in MODULES]
    finally:
        _pop_modules()
        sys.modules.update(installed)


def _pop_modules() -> dict[str, ModuleType]:
    """Remove reasoning-gym from the imported modules, and return what was removed."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == PACKAGES[0]}
