"""What pip installs: the wheel holds every file of the package, and all that needs them works outside of a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CIFAR = ROOT / "tests" / "models" / "cifar_mobilenet.onnx"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def run(command: Sequence[str | Path], place: Path) -> str:
    """What a command prints, run where nothing leads to the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=place, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The package's files, as git knows them; new ones that are not ignored are meant to come along."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout: it tells which files belong to the package")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", "qconv"]
    names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of those files: a checkout keeps old ones in build/, which would come along."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ["pyproject.toml", "README.md", "LICENSE", *tracked]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    return out / run([sys.executable, "-c", BUILD, out], source).splitlines()[-1]


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, which borrows the libraries of the one that runs the tests.

    A folder named in a .pth file is searched, but .pth files in it are not read: an editable qconv stays out of sight.
    """
    home = tmp_path_factory.mktemp("environment")
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    builder.create(home)
    context = builder.ensure_directories(home)
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        context.env_exe,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run([*command, wheel], home)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([context.env_exe, "-c", code], home).strip())
    assert (site / "qconv" / "__init__.py").exists()
    libraries = [name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")]
    (site / "libraries.pth").write_text("".join(f"{name}\n" for name in libraries))
    return Path(context.bin_path)


def test_the_wheel_holds_each_file_of_the_package(wheel: Path, tracked: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(held) == tracked
    assert "qconv/py.typed" in held


def test_the_checkout_is_out_of_sight(bin_folder: Path, tmp_path: Path) -> None:
    found = run([bin_folder / "python", "-c", "import qconv; print(qconv.__file__)"], tmp_path)
    assert bin_folder.parent in Path(found.strip()).parents


def test_the_command_answers(bin_folder: Path, tmp_path: Path) -> None:
    assert "quantize" in run([bin_folder / "qconv", "--help"], tmp_path)


def test_a_network_is_quantized_and_timed(bin_folder: Path, tmp_path: Path) -> None:
    """benchmark starts its worker by the module's name, with the Python that runs it."""
    calib = tmp_path / "calib"
    calib.mkdir()
    for picture in sorted((ROOT / "calib_samples").glob("*.jpg"))[:6]:
        shutil.copyfile(picture, calib / picture.name)
    options = ["--preprocess", "imagenet", "--resize", "exact", "--effort", "fast", "--threads", "1", "--quiet"]
    run([bin_folder / "qconv", "quantize", CIFAR, "--calib", calib, *options, "-o", "small.onnx"], tmp_path)
    command = [bin_folder / "qconv", "benchmark", CIFAR, "small.onnx", "--rounds", "2", "--threads", "1", "--json"]
    assert json.loads(run(command, tmp_path))["speedup"] > 0


def test_a_page_finds_its_template(bin_folder: Path, tmp_path: Path) -> None:
    for library in ("jinja2", "plotly"):
        pytest.importorskip(library, reason="needs the extra: pip install 'qconv[report]'")
    options = [
        "--calib",
        "none",
        "--preprocess",
        "imagenet",
        "--effort",
        "fast",
        "--threads",
        "1",
        "--quiet",
        "-o",
        "small.onnx",
    ]
    run([bin_folder / "qconv", "quantize", CIFAR, *options, "--report", "page.html"], tmp_path)
    assert "<style>" in (tmp_path / "page.html").read_text("utf-8")
