"""Each command once, on the network and the pictures of the repository: does it run at all with these libraries?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qconv.cli.main import cli
from tests.support.libraries import runner

ROOT = Path(__file__).parent.parent
CIFAR = str(ROOT / "tests" / "models" / "cifar_mobilenet.onnx")
PICTURES = str(ROOT / "calib_samples")
FED = ("--preprocess", "imagenet", "--resize", "exact", "--samples", "4", "--threads", "1")
NEEDS_TORCH = ("finetune", "synthesize")
WORDS = {
    "audit": [CIFAR],
    "benchmark": [CIFAR, "small.onnx", "--rounds", "2", "--threads", "1"],
    "compare": [CIFAR, "small.onnx", "--images", PICTURES, *FED],
    "diagnose": [CIFAR, "--calib", PICTURES, "--images", PICTURES, "--effort", "fast", *FED],
    "evaluate": ["small.onnx", "--against", CIFAR, "--images", PICTURES, *FED],
    "finetune": [
        "small.onnx",
        "--teacher",
        CIFAR,
        "--images",
        PICTURES,
        "--epochs",
        "1",
        *FED,
        "--samples",
        "16",
        "-o",
        "trained.onnx",
    ],
    "inspect": [CIFAR],
    "manual": ["quantize"],
    "merge-stats": ["small.npz", "small.npz", "-o", "sum.npz"],
    "quantize": [CIFAR, "--calib", PICTURES, *FED, "-o", "again.onnx"],
    "study-samples": [CIFAR, "--calib", PICTURES, "--images", PICTURES, *FED],
    "synthesize": [CIFAR, "-n", "1", "--iterations", "2", "--preprocess", "imagenet", "-o", "made"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized network and what was seen of its activations."""
    folder = tmp_path_factory.mktemp("commands")
    made = ["-o", str(folder / "small.onnx"), "--save-stats", str(folder / "small.npz")]
    words = ["quantize", CIFAR, "--calib", PICTURES, "--effort", "fast", *FED, "--quiet", *made]
    assert runner().invoke(cli, words, standalone_mode=False).exit_code == 0
    return folder


@pytest.mark.always
@pytest.mark.parametrize("command", sorted(cli.load_all()))
def test_a_command_runs(command: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command in NEEDS_TORCH:
        pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    monkeypatch.chdir(results)
    told = [] if command == "manual" else ["--json"]
    done = runner().invoke(cli, [command, *WORDS[command], *told], standalone_mode=False)
    assert done.exception is None, done.output
    assert json.loads(done.stdout) if told else done.stdout
