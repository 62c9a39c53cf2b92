"""What must not be imported, so that `--help` answers at once. Layers are held by import-linter, see pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qconv

PACKAGE = Path(qconv.__file__).parent


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
