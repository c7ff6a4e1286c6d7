"""Folders are ordered as in a run: a module imports only from its own folder or earlier ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smt_trainer

PACKAGE = Path(smt_trainer.__file__).parent
# The files outside the folders come first.
ORDER = [
    "",
    "model",
    "scores",
    "selection",
    "sparse",
    "delta",
    "merging",
    "arithmetic",
    "export",
    "training",
    "estimation",
    "plotting",
    "cli",
]
# This folder imports Trainer and its callbacks on import.
HOME_OF_TRAINER = "training"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def folder(name: str) -> str:
    return name.partition(".")[0] if name.partition(".")[0] in ORDER else ""


def imports(tree: ast.AST) -> set[str]:
    """Return the full names of all modules imported under a node, but for those under `TYPE_CHECKING`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found |= imports(node)
    return found


def ours(tree: ast.AST) -> set[str]:
    """Return the package's own modules imported under a node."""
    return {name.removeprefix("smt_trainer.") for name in imports(tree)} & set(MODULES)


def test_every_folder_has_a_place_in_the_order():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ORDER[1:])


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_from_its_folder_or_those_before(name):
    later = {imported for imported in ours(MODULES[name]) if ORDER.index(folder(imported)) > ORDER.index(folder(name))}
    assert not later


@pytest.mark.parametrize("name", [name for name in ORDER if name])
def test_no_folder_has_circular_imports(name):
    own = {module: ours(tree) - {module} for module, tree in MODULES.items() if folder(module) == name}
    left = {module: imported & set(own) - {name} for module, imported in own.items()}
    while left:
        free = {module for module, imported in left.items() if not imported & set(left)}
        assert free, f"these modules import each other in a circle: {sorted(left)}"
        left = {module: imported for module, imported in left.items() if module not in free}


def test_only_the_training_folder_imports_transformers_on_loading():
    importing = {
        folder(name)
        for name, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(imported.split(".")[0] == "transformers" for imported in imports(ast.Module([node], [])))
    }
    assert importing == {HOME_OF_TRAINER}


def loaded_by(statement: str) -> set[str]:
    """Return the heavy packages that a new interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*{{'torch', 'transformers', 'matplotlib'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import smt_trainer, smt_trainer.cli", set()),
        ("from smt_trainer import SMTConfig, SMTError; SMTConfig()", set()),
        ("from smt_trainer import BlockSelection, Delta, merge_checkpoint; import smt_trainer.merging.verify", set()),
        ("from smt_trainer import export_lora", set()),
        ("from smt_trainer import convert_to_smt, load_delta, plot_selection", {"torch"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement, heavy):
    assert loaded_by(statement) == heavy


def test_help_loads_nothing_heavy():
    script = """import contextlib, io, sys
from smt_trainer.cli import main
from smt_trainer.cli.main import COMMANDS
heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'matplotlib', 'huggingface_hub', 'tqdm'}
def help_of(*command):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*command, '--help'])
    print(command, *heavy & {*sys.modules})
    return output.getvalue()
names = [line.split()[0] for line in help_of().splitlines() if line.startswith('    ') and line[4] != ' ']
assert len(names) == len(COMMANDS), names
for name in names:
    assert f'usage: smt {name}' in help_of(name)"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 10 and all(line.endswith(")") for line in run.stdout.splitlines()), run.stdout


def test_every_public_name_can_be_imported():
    assert all(getattr(smt_trainer, name).__name__ == name for name in smt_trainer.__all__)
    assert set(smt_trainer.__all__) <= set(dir(smt_trainer))
    with pytest.raises(AttributeError, match="no attribute 'SMTModel'"):
        smt_trainer.SMTModel  # noqa: B018


def test_the_tests_mirror_the_package():
    tests = Path(__file__).parents[1]
    mirrored = {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert mirrored == {*ORDER[1:], "support", "contracts", "runs", "recipes", "clients"}
