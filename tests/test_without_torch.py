"""PyTorch is an extra: without it all that does not train works, and its tests skip and say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.support.models import network

ROOT = Path(__file__).parent.parent
WITH_TORCH = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/training").glob("test_*.py"))
BLOCKER = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a Python that finds no torch."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def test_torch_is_really_missing(environment: dict[str, str]) -> None:
    done = python(environment, "-c", "import torch")
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr
    done = python(environment, "-c", "import qconv.training.network")
    assert "No module named 'torch'" in done.stderr


def test_the_package_can_be_imported(environment: dict[str, str]) -> None:
    done = python(environment, "-c", "import qconv; qconv.quantize; print(qconv.__version__)")
    assert (done.returncode, done.stderr) == (0, "")


def test_pages_can_be_built(environment: dict[str, str]) -> None:
    """All but that of synthesized pictures, of which there are none."""
    done = python(environment, "-c", "import qconv.report.pages, qconv.report.study_chart, qconv.report.console")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_answers(environment: dict[str, str]) -> None:
    done = python(environment, "-m", "qconv", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "quantize" in done.stdout


def test_a_network_is_quantized(environment: dict[str, str], tmp_path: Path) -> None:
    model, out, calib = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "calib"
    body = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, g)"
    onnx.save(network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), g=(8, 5)), model)
    calib.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(calib / f"{number}.png")
    options = ["--preprocess", "raw", "--threads", "1", "-o", str(out)]
    done = python(environment, "-m", "qconv", "quantize", str(model), "--calib", str(calib), *options)
    assert done.returncode == 0, done.stderr
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(out).graph.node)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["finetune", "MODEL", "--images", "."], "qconv finetune"),
        (["synthesize", "MODEL", "-o", "made"], "qconv synthesize"),
        (
            [
                "quantize",
                "MODEL",
                "--calib",
                "none",
                "--fallback",
                "synthesized",
                "--preprocess",
                "unit",
                "-o",
                "o.onnx",
            ],
            "--fallback synthesized",
        ),
        (
            ["quantize", "MODEL", "--calib", ".", "--rounding", "reconstruct", "--preprocess", "unit", "-o", "o.onnx"],
            "--rounding reconstruct",
        ),
    ],
)
def test_one_error_says_what_to_install(
    environment: dict[str, str], tmp_path: Path, command: list[str], what: str
) -> None:
    onnx.save(network("y = Conv(x, w)", ("N", 3, 8, 8), w=(8, 3, 3, 3)), tmp_path / "model.onnx")
    words = [str(tmp_path / "model.onnx") if word == "MODEL" else word for word in command]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "qconv", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if "PyTorch" in line]
    assert line.startswith(f"Error: {what} needs PyTorch, which is not installed")
    assert "pip install 'qconv[torch]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert (
        sorted(path for path in tmp_path.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc") == before
    )


def test_tests_of_what_needs_torch_are_skipped(environment: dict[str, str]) -> None:
    done = python(environment, "-m", "pytest", "-p", "no:cacheprovider", *WITH_TORCH)
    assert done.stdout.count("needs the extra: pip install 'qconv[torch]'") == len(WITH_TORCH) > 5
    assert f"{len(WITH_TORCH)} skipped" in done.stdout
