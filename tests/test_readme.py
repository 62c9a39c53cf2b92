"""The README is true: its commands run, its output is that of a run, its tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference import README, in_readme, reference

from qconv.cli.options import parse_number
from qconv.config.preprocessing import PRESETS

ROOT = README.parent
TEXT = README.read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README imagines it: model.onnx, imgs, and qconv on the PATH."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "model.onnx").write_bytes((ROOT / "tests/models/cifar_mobilenet.onnx").read_bytes())
    (folder / "imgs").mkdir()
    for picture in sorted((ROOT / "calib_samples").glob("*.jpg"))[::2]:
        (folder / "imgs" / picture.name).symlink_to(picture)
    (folder / "bin").mkdir()
    script = folder / "bin" / "qconv"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qconv "$@"\n')
    script.chmod(0o755)
    return folder


def shell(place: Path, command: str) -> subprocess.CompletedProcess[str]:
    before = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{ROOT}:{before}" if before else str(ROOT)
    options = {"cwd": place, "env": environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], **options)


@pytest.mark.parametrize("command", blocks("sh"), ids=lambda text: text.splitlines()[0][:60])
def test_recipes_run(place: Path, command: str) -> None:
    if any(words in command for words in ("qconv finetune", "qconv synthesize", "reconstruct")):
        pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    if "reconstruct" in command:
        command = f"{command.rstrip()} --effort fast --samples 8"  # the last one counts
    done = shell(place, command)
    assert done.returncode == 0, done.stderr


def test_the_lines_for_ci_run(place: Path) -> None:
    commands = [line.partition("run: ")[2] for block in blocks("yaml") for line in block.splitlines()]
    ours = [command for command in commands if command.startswith("qconv ")]
    assert ours
    for command in ours:
        done = shell(place, command)
        assert done.returncode == 0, done.stderr
        assert all(gate["held"] for gate in json.loads((place / "report.json").read_text())["gates"])


def test_the_makefile_makes(place: Path) -> None:
    (rules,) = blocks("make")
    (place / "Makefile").write_text(rules)
    (place / "model.w8a8.onnx").unlink(missing_ok=True)
    done = shell(place, "make --no-print-directory model.w8a8.onnx")
    assert done.returncode == 0, done.stderr
    assert (place / "model.w8a8.onnx").stat().st_size > 100_000


def test_the_python_lines_run(place: Path) -> None:
    (lines,) = blocks("python")
    (place / "lines.py").write_text(lines)
    done = shell(place, f"'{sys.executable}' lines.py")
    assert done.returncode == 0, done.stderr


def test_the_summary_is_that_of_a_run(place: Path) -> None:
    """All but the numbers, which depend on pictures and machine, and with them the order of what was changed."""
    (block,) = blocks("console")
    command, *shown = block.splitlines()
    done = shell(place, command.removeprefix("$ "))
    assert done.returncode == 0, done.stderr
    assert sorted(map(without_numbers, done.stdout.splitlines())) == sorted(map(without_numbers, shown))


def without_numbers(line: str) -> str:
    """Nor with the count in front of a change, which is left out where it is one."""
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"^(changed +)\d+ x ", r"\1", line))


def test_the_option_reference_is_that_of_the_command_line() -> None:
    """`make fix` writes it."""
    assert in_readme(TEXT) == reference()


def test_the_keys_of_the_report(place: Path) -> None:
    done = shell(place, "qconv quantize model.onnx --calib imgs --samples 4 --json")
    section = TEXT.partition("## The report as JSON")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(json.loads(done.stdout))


def test_the_presets() -> None:
    section = TEXT.partition("## Preprocessing")[2].partition("\n## ")[0]
    rows = {cells[1].strip(" `"): cells for line in section.splitlines() if len(cells := line.split("|")) > 6}
    for name, preset in PRESETS.items():
        color, scale, mean, std = (cell.strip() for cell in rows[name][2:6])
        assert color.lower() == preset.color
        assert parse_number(scale) == preset.scale
        assert tuple(map(float, mean.split(","))) == preset.mean
        assert tuple(map(float, std.split(","))) == preset.std


def test_no_table_is_missing() -> None:
    assert re.findall(r"^[A-Z]+_TABLE$", TEXT, re.MULTILINE) == []


def test_make_demo_and_make_test_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in TEXT
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
