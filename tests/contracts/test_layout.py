"""The package's floors: a module imports from its own floor or lower ones, and nothing in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import smt_trainer

PACKAGE = Path(smt_trainer.__file__).parent
SCORERS = ("accumulated", "activation", "block_sums", "classwise", "scorer", "weights")
PICTURES = ("block_map", "folder", "histogram", "layers", "overlap", "scores", "shares", "style", "tables")
FLOORS = [
    {"errors", "files", "config", "blocks", "targets", "sharding", "meter", "classes"},
    {
        *("budget", "selection", "dependencies", "block_scores", "ops", "ops.kept_input", "ops.sparse_linear"),
        *("scores", *(f"scores.{name}" for name in SCORERS)),
    },
    {"layers", "whole", "card", "overlap", "plotting", *(f"plotting.{name}" for name in PICTURES)},
    {"plan", "convert", "delta", "merge", "warmup", "parallel", "refusals", "estimate"},
    {"trainer", "checkpoints", "callbacks"},
    {
        *("cli", "cli.main", "cli.options", "cli.examples"),
        *("cli.merge_delta", "cli.inspect_artefact", "cli.estimate", "cli.select"),
    },
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
HOMES_OF_TRAINER = {"trainer", "checkpoints", "callbacks"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if (name := module_name(path))}


def imports(tree: ast.AST) -> set[str]:
    """Full names of all modules imported under a node."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(tree: ast.AST) -> set[str]:
    """The package's own modules imported under a node."""
    return {name.removeprefix("smt_trainer.") for name in imports(tree)} & set(MODULES)


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOOR_OF)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_floor_or_below(name):
    above = {imported for imported in ours(MODULES[name]) if FLOOR_OF[imported] > FLOOR_OF[name]}
    assert not above


def test_no_module_imports_itself_through_others():
    top_level = {name: ours(tree) - {name} for name, tree in MODULES.items() if not name.startswith("cli")}
    assert len(list(graphlib.TopologicalSorter(top_level).static_order())) == len(top_level)


def test_transformers_is_imported_on_loading_by_the_home_of_trainer_alone():
    importing = {
        name
        for name, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(imported.split(".")[0] == "transformers" for imported in imports(node))
    }
    assert importing == HOMES_OF_TRAINER


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*{{'torch', 'transformers', 'matplotlib'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import smt_trainer, smt_trainer.cli", set()),
        ("from smt_trainer import SMTConfig, SMTError; SMTConfig()", set()),
        ("from smt_trainer import convert_to_smt, load_delta, merge_checkpoint, plot_selection", {"torch"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement, heavy):
    assert loaded_by(statement) == heavy


def test_every_public_name_can_be_imported():
    assert all(getattr(smt_trainer, name).__name__ == name for name in smt_trainer.__all__)
    assert set(smt_trainer.__all__) <= set(dir(smt_trainer))
    with pytest.raises(AttributeError, match="no attribute 'SMTModel'"):
        smt_trainer.SMTModel  # noqa: B018
