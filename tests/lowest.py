"""Installs the lowest versions of libraries that pyproject.toml allows, so that tests tell whether that is true.

    python tests/lowest.py .lowest              exactly the lowest
    python tests/lowest.py --newest .newest     the newest that there are

`make lowest` runs the demo and the tests in both. There is no list of versions but that of pyproject.toml.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"
EXTRA = "report"  # its libraries are needed as well; those of the other extras are no part of what qconv does by itself
TESTS = f"test,{EXTRA}"


def lowest(project: dict[str, Any]) -> list[str]:
    """`name==version` of each library that a project's table names with `name>=version`."""
    bounds = [*project["dependencies"], *project["optional-dependencies"][EXTRA]]
    found = [re.fullmatch(r"([\w.-]+) *>= *([\w.]+)", bound) for bound in bounds]
    for bound, match in zip(bounds, found, strict=True):
        if match is None:
            raise SystemExit(f"pyproject.toml says {bound!r}: tests/lowest.py reads only NAME>=VERSION.")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def interpreter(project: dict[str, Any]) -> str:
    """The oldest Python that the project runs on, if there is one: new ones have no wheels of old libraries."""
    oldest = project["requires-python"].removeprefix(">=").strip()
    if oldest == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    there = shutil.which(f"python{oldest}")
    if there is None:
        print(f"there is no python{oldest} here; old libraries may have no wheels for {sys.version.split()[0]}.")
    return there or sys.executable


def install(home: Path, versions: list[str], python: str, *options: str) -> None:
    """An environment with qconv as it lies here, what its tests need, and these versions."""
    if not (home / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, "-e", f"{ROOT}[{TESTS}]", *versions], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, metavar="FOLDER", help="of the environment")
    parser.add_argument("--newest", action="store_true", help="the newest versions instead of the lowest")
    arguments = parser.parse_args()
    home: Path = arguments.home.absolute()
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    stamp = home / ".installed"  # the Makefile's: newer than what is installed
    if arguments.newest:
        install(home, [], sys.executable, "--upgrade", "--upgrade-strategy", "eager")
    else:
        print("lowest versions:", *lowest(project), flush=True)
        wanted = hashlib.sha256(PYPROJECT.read_bytes()).hexdigest()
        if not stamp.exists() or stamp.read_text("utf-8") != wanted:
            shutil.rmtree(home, ignore_errors=True)  # a library that is needed no longer would stay
            install(home, lowest(project), interpreter(project))
        stamp.write_text(wanted, "utf-8")
        return
    stamp.touch()


if __name__ == "__main__":
    main()
