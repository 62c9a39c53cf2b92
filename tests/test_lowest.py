"""What `make lowest` installs, and which tests `--tenth` takes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qconv.cli.main import cli
from tests.lowest import PYPROJECT, lowest

ROOT = Path(__file__).parent.parent


def test_every_library_is_pinned_to_its_bound() -> None:
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    found = lowest(project)
    assert set(project["dependencies"]) < {pin.replace("==", ">=") for pin in found}
    assert all(pin.count("==") == 1 for pin in found)


@pytest.mark.parametrize("bound", ["numpy", "numpy==2.0", "numpy>=2.0,<3", "numpy>2"])
def test_a_bound_that_cannot_be_read_stops_it(bound: str) -> None:
    with pytest.raises(SystemExit, match="NAME>=VERSION"):
        lowest({"dependencies": [bound], "optional-dependencies": {"report": []}})


def test_a_tenth_has_every_command() -> None:
    """And is the same one at each call, of any set of files."""

    def names(*words: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return {line for line in done.stdout.splitlines() if "::" in line}

    few = names("--tenth", "tests/test_commands.py", "tests/test_quantizer.py")
    assert {f"tests/test_commands.py::test_a_command_runs[{command}]" for command in cli.load_all()} <= few
    more = {name for name in few if "test_quantizer" in name}
    assert names("--tenth", "tests/test_quantizer.py") == more
    assert 0.05 < len(more) / len(names("tests/test_quantizer.py")) < 0.2
