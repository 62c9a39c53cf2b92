"""The size of the house, its names, and what must not be imported, so that `--help` answers at once.

Who may import whom is held by import-linter, see pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import qconv

PACKAGE = Path(qconv.__file__).parent
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
LINES = {name: len((PACKAGE / name).read_text("utf-8").splitlines()) for name in TREES}

MOST_MODULES = 248
MOST_LINES, MOST_LINES_WITH_A_REASON = 450, 700
MOST_LINES_OF_A_FUNCTION = 60

LONG_MODULES = {
    "api.py": "a function a command, with its options for arguments",
    "calibration/range_estimators.py": "a calibrator is added here and nowhere else",
    "data/autodetect.py": "one sequential test and what feeds it",
    "data_free/propagation.py": "a table of rules by operator, for means and for distributions",
    "training/onnx_ops.py": "a table of ONNX operators in PyTorch",
    "training/synthesize.py": "one command and its optimizer",
    "training/trainable.py": "a table of what can be trained in a Q/DQ file",
}
"""Modules above MOST_LINES, each one table or one concept, and why it is not cut."""

TO_BE_SHORTENED: set[str] = set()
"""Functions above MOST_LINES_OF_A_FUNCTION. None is added."""


def functions() -> Iterator[tuple[str, int]]:
    """Every function as "module name", with its lines."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{name} {node.name}", node.end_lineno - node.lineno + 1


def test_the_house_stays_small() -> None:
    assert len([name for name in TREES if not name.endswith("__init__.py")]) <= MOST_MODULES


def test_long_modules_have_a_reason() -> None:
    assert {name for name, lines in LINES.items() if lines > MOST_LINES} <= LONG_MODULES.keys()
    assert {name for name, lines in LINES.items() if lines > MOST_LINES_WITH_A_REASON} == set()


def test_functions_are_short() -> None:
    long = {name for name, lines in functions() if lines > MOST_LINES_OF_A_FUNCTION}
    assert long <= TO_BE_SHORTENED


def test_no_reason_is_left_behind() -> None:
    """What was shortened leaves the lists above."""
    assert {name for name in LONG_MODULES if LINES.get(name, 0) <= MOST_LINES} == set()
    sizes = dict(functions())
    assert {name for name in TO_BE_SHORTENED if sizes.get(name, 0) <= MOST_LINES_OF_A_FUNCTION} == set()


def test_no_class_name_is_used_twice() -> None:
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_that_the_prose_names_exist() -> None:
    """Docstrings and comments name modules by their paths from the package, and tests by theirs from the repository."""
    missing = []
    for name in TREES:
        for file in re.findall(r"\b[\w/]+\.py\b", (PACKAGE / name).read_text("utf-8")):
            if file != "FILE.py" and not any((folder / file).exists() for folder in (PACKAGE, PACKAGE.parent)):
                missing.append(f"{name}: {file}")
    assert missing == []


def test_prose_stands_in_docstrings() -> None:
    """Where an editor shows it, and not in blocks of comments between functions."""
    blocks = {name for name in TREES if re.search(r"^(#.*\n){3}", (PACKAGE / name).read_text("utf-8"), re.MULTILINE)}
    assert blocks == set()


def test_private_names_stay_in_their_package() -> None:
    """Imported, or reached through a module that is."""
    found = []
    for name, tree in TREES.items():
        package = name.split("/")[0]
        modules = {}  # by the name they have in this file
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qconv":
                for alias in node.names:
                    origin = f"{node.module}.{alias.name}".split(".")
                    modules[alias.asname or alias.name] = origin
                    foreign = len(origin) > 2 and origin[1] != package
                    if foreign and alias.name.startswith("_") and not alias.name.startswith("__"):
                        found.append(f"{name}: {'.'.join(origin)}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                origin = modules[node.value.id]
                is_module = "/".join(origin[1:]) + ".py" in TREES
                if is_module and origin[1] != package and node.attr.startswith("_") and not node.attr.startswith("__"):
                    found.append(f"{name}: {'.'.join(origin)}.{node.attr}")
    assert found == []


def heavy_after(statement: str) -> str:
    code = (
        f"import sys\n{statement}\n"
        "heavy = ('numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'PIL', 'sympy', 'jinja2', 'plotly', 'torch')\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stderr.strip()


def test_help_and_version_import_nothing_heavy() -> None:
    """They answer in the time that Python takes to start."""
    for option in ("--help", "--version"):
        run = f"sys.argv = ['qconv', '{option}']\nfrom qconv.cli.main import main\ntry: main()\nexcept SystemExit: pass"
        assert heavy_after(run) == ""


@pytest.mark.parametrize("names", ["errors", "config.recipe", "config.targets", "ir.operators", "results.quantize"])
def test_words_need_no_numbers(names: str) -> None:
    assert heavy_after(f"import qconv.{names}") == ""


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert heavy_after("import numpy") == "numpy"
